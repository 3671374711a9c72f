"""The ``triattention`` command line."""
