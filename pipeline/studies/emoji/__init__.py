"""The emoji study: scenes in four artists' styles, and models made of pretrained parts that packages carry."""
