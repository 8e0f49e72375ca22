"""Starting and stopping Flower's processes, and the command lines of server and client."""
