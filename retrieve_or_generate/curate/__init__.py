"""Curation, the same code for every source: `curation.curate` decides, the other modules each give one reason to drop an image."""
