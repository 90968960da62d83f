"""Published model dimensions as data, each with its source."""
