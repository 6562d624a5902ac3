"""``chatbridge serve``: OpenAI's HTTP interface to the engine. It needs the extra ``serve``."""
