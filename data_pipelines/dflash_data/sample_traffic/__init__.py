"""A seeded fleet of clients, whose log stands in for production traffic."""
