"""ChatBridge and its parts: encoders, perceiver, language model, their weight files; no data set is known."""
