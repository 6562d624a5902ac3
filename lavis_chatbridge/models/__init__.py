"""ChatBridge and its parts: encoders, perceiver, language model, their weight files. Knows no data set."""
