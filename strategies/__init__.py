"""The server side: any Flower strategy by name, the wiretap around it, and the ServerApp that runs a setting."""
