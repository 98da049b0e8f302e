"""The images: their Dockerfiles, and what builds, pins and tries them. Needs nothing but Python's own library."""
