"""What client.py and server.py share, and no reader of the two has to open."""
