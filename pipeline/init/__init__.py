"""From a folder of images and annotations to a config that runs."""
