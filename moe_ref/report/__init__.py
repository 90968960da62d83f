"""Reports: records in; head lines, Markdown, one HTML page and JSON out. Imports no torch."""
