"""The format: names, layout, records and codecs of a store."""
