"""The contract that clients and workers share: messages, codec, transports, store, resources."""
