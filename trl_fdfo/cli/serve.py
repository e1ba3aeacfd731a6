"""
`trl-fdfo serve`: rewards for training processes on this machine or others, which ask them by the reward `http`.

    trl-fdfo serve pickscore "clip(dtype='bfloat16')" --devices cuda:0 cuda:1
    trl-fdfo serve my_module:reward --port 8201
    REWARD_SERVER_TOKEN=... trl-fdfo serve pickscore --host 0.0.0.0

docs/rewards.md describes the protocol, and what happens when something goes wrong.
"""

import os
from dataclasses import asdict, dataclass, field

from .arguments import Parser
from .quick import check_rewards, reward_table


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
            "help": "Token that requests must have. Default: REWARD_SERVER_TOKEN in the environment, which `ps` does not show."
        },
    )


def main(args: list[str] | None = None) -> None:
    usage = "%(prog)s REWARD [REWARD ...] [--OPTION VALUE ...]"
    parser = Parser(Arguments, prog="trl-fdfo serve", usage=usage, epilog=reward_table())
    parser.add_argument("rewards", nargs="+", metavar="REWARD", help="A reward, listed below, or module:callable.")
    arguments, rest = parser.parse_args_and_config(args)
    check_rewards(rest.rewards)
    from ..rewards.http_reward import TOKEN
    from ..rewards.serving import serve

    arguments.token = os.environ.get(TOKEN, "") if arguments.token is None else arguments.token
    serve(rest.rewards, **asdict(arguments))
