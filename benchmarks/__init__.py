"""Claims of speed, each measured against the peer it is claimed over, in one run on one machine."""
