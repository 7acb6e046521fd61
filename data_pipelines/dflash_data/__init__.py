"""From traffic logs to conversations and target features."""
