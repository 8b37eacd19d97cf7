"""One rank of a training run, from its configuration to its exit status."""

from collections.abc import Sequence

from cluster.env import RankEnv
from trainer.distributed.rank_process import load_on_all, run_to_the_end
from trainer.loop import Trainer
from trainer.recipes import load_recipe


def train_rank(config: str, env: RankEnv, *, overrides: Sequence[str] = (), debug: bool = False) -> int:
    """Train to the end; what the user should know is said once, on standard error.

    Args:
        config: a YAML file, or the name of a shipped recipe.
        env: this rank.
        overrides: "key.sub=value".
        debug: show the traceback of errors that the user can mend.

    Returns:
        The exit status of this rank's process: see `trainer.distributed.rank_process.run_to_the_end`.
    """

    def action() -> None:
        Trainer(load_on_all(lambda: load_recipe(config, overrides), env), env).fit()

    return run_to_the_end(action, env, debug=debug)
