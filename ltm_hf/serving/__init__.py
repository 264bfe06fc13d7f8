"""One model behind OpenAI's API: the server, and an answer on its way to a client."""
