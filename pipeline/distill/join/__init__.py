"""The join: samples of shards with their targets from stores."""
