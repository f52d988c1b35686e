"""A server's process over the small engine, as tests of its life want it: PORT, then FIELD=NUMBER.

Its limits are those of `dsjax serve` unless they are given. The API key is `secret`.
"""

import sys
from dataclasses import replace

from dsjax.config import ServeConfig
from dsjax.data.chat import ChatTemplate
from dsjax.serving.gate import log_as_json
from dsjax.serving.server import serve
from tests.dsjax.engine.small_engine import TOKENIZER, an_engine
from tests.dsjax.serving.served import TEMPLATE


def main() -> None:
    """Serves until it is told to end."""
    usual = ServeConfig(port=int(sys.argv[1]), model_names=("small",))
    given = dict(argument.split("=") for argument in sys.argv[2:])
    limits = {name: type(getattr(usual, name))(value) for name, value in given.items()}
    TOKENIZER.chat_template = ChatTemplate(TEMPLATE, "", "")
    log_as_json()
    with an_engine(num_pages=80, warm_up=True) as engine:
        serve(engine, replace(usual, **limits), keys=("secret",))


if __name__ == "__main__":
    main()
