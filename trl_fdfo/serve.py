"""
Serves rewards to training processes on this machine or others, which ask them by the reward `http`.

    python -m trl_fdfo.serve pickscore "clip(dtype='bfloat16')" --devices cuda:0 cuda:1
    python -m trl_fdfo.serve my_module:reward --port 8201
    REWARD_SERVER_TOKEN=... python -m trl_fdfo.serve pickscore --host 0.0.0.0

docs/rewards.md describes the protocol, and what happens when something goes wrong.
"""

import os
from dataclasses import asdict, dataclass, field

from .cli.arguments import Parser
from .rewards.by_name import reward_table
from .rewards.http_reward import TOKEN
from .rewards.serving import serve


@dataclass
class Arguments:
    host: str = field(
        default="127.0.0.1", metadata={"help": "Address to listen at. Beyond this machine needs a token."}
    )
    port: int = field(default=8200, metadata={"help": "Port to listen at."})
    processes: int | None = field(
        default=None, metadata={"help": "Processes of each reward, which share its requests. Default: one per device."}
    )
    devices: list[str] = field(
        default_factory=list, metadata={"help": "Devices of the processes in turn: cuda:0 cuda:1, or cpu."}
    )
    max_batch_size: int = field(default=64, metadata={"help": "Most samples of requests that are scored together."})
    max_waiting: int = field(
        default=64, metadata={"help": "Most requests that wait; a further one is answered by 429."}
    )
    max_megabytes: float = field(default=512.0, metadata={"help": "Largest body of a request, in 10^6 bytes."})
    token: str | None = field(
        default=None,
        metadata={
            "help": f"Token that requests must have. Default: {TOKEN} in the environment, which `ps` does not show."
        },
    )


def main(args: list[str] | None = None) -> None:
    parser = Parser(Arguments, prog="python -m trl_fdfo.serve", epilog=reward_table())
    parser.add_argument("rewards", nargs="+", metavar="REWARD", help="A reward, listed below, or module:callable.")
    arguments, rest = parser.parse_args_and_config(args)
    arguments.token = os.environ.get(TOKEN, "") if arguments.token is None else arguments.token
    serve(rest.rewards, **asdict(arguments))


if __name__ == "__main__":
    main()
