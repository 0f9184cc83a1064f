"""Scores before, during and after training, taken without leaving a trace in the training."""

import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from phi3v.config import TrainConfig
from phi3v.data.dataset import ConversationDataset
from phi3v.errors import StoppedError
from phi3v.eval.answer import EvalSettings, Share
from phi3v.eval.run import EvalResult, evaluate_model
from phi3v.model.processing_phi3_v import Phi3VProcessor
from phi3v.runlog import EvalMoment, RunDirectory
from phi3v.train.scores import SCORE_KEY
from phi3v.train.stopping import Stop
from phi3v.train.tuning import Precision

logger = logging.getLogger(__name__)


class Scorer:
    """Takes scores of the model in training, in the precision it trains in, and records them.

    Several processes share the questions out; the first one records the result, and all of them get the score.

    Args:
        processor: the model's.
        dataset: checked evaluation samples.
        config: metric, batch size and limits.
        precision: what training computes in.
        args: says which process this is.
        run: where the results go.
        stop: a score that it meets is not taken to its end.
    """

    def __init__(
        self,
        processor: Phi3VProcessor,
        dataset: ConversationDataset,
        *,
        config: TrainConfig,
        precision: Precision,
        args: TrainingArguments,
        run: RunDirectory,
        stop: Stop,
    ) -> None:
        self._processor = processor
        self._dataset = dataset
        self._config = config
        self._precision = precision
        self._args = args
        self._run = run
        self._stop = stop

    def score(
        self, model: PreTrainedModel | PeftModel, step: int, when: EvalMoment, *, may_reuse: bool = True
    ) -> float:
        """Takes and records the score of the model as it is; every process gets it.

        A score of the same weights that is on record is taken over: the one from before training when a run starts
        again, and a mid-run one after training.

        Args:
            model: with all its weights on every process, not wrapped for distributed training.
            step: optimizer steps that the model has behind it.
            when: ``before``, ``during`` or ``after`` training.
            may_reuse: False when the weights are not those that a mid-run score of this step was taken of.

        Raises:
            StoppedError: in all processes, when one is asked to stop meanwhile.
        """
        recorded = [self._recorded(step, when, may_reuse) if self._args.process_index == 0 else None]
        if self._args.world_size > 1:
            broadcast_object_list(recorded)
        (score,) = recorded
        if score is not None:
            return score
        result = self._evaluate(model)
        if self._args.process_index == 0:
            self._record(result, step, when)
        return result.score.score

    def score_during(self, model: PreTrainedModel | PeftModel, step: int) -> dict[str, float]:
        """Takes a mid-run score; returns what Trainer logs: nothing when the run is asked to stop meanwhile."""
        try:
            return {SCORE_KEY: self.score(model, step, "during")}
        except StoppedError:
            self._stop.is_agreed = True
            return {}

    def _recorded(self, step: int, when: EvalMoment, may_reuse: bool) -> float | None:
        """Returns a score on record of the same weights, or None."""
        if when == "before" and (line := self._run.evaluation("before")) is not None:
            return line["score"]
        if when == "during" or (when == "after" and may_reuse):
            for line in self._run.evals():
                if line["when"] == "during" and line["step"] == step:
                    if when == "after":
                        self._run.append_eval({**line, "when": "after"})
                    return line["score"]
        return None

    def _evaluate(self, model: PreTrainedModel | PeftModel) -> EvalResult:
        config, args = self._config, self._args
        with undisturbed(model), self._precision.autocast(args.device):
            return evaluate_model(
                model,
                self._processor,
                self._dataset,
                EvalSettings(
                    metric=config.eval_metric,
                    scoring=config.eval_scoring,
                    labels=config.eval_labels,
                    batch_size=config.eval_batch_size,
                    max_new_tokens=config.eval_max_new_tokens,
                    limit=config.eval_limit,
                    seed=config.seed,
                    progress=config.progress and args.process_index == 0,
                ),
                Share(args.process_index, args.world_size),
                should_stop=lambda: self._stop.is_asked,
            )

    def _record(self, result: EvalResult, step: int, when: EvalMoment) -> None:
        # The predictions first: a line of eval.jsonl says that they are there.
        self._run.write_predictions(step, result.rows)
        self._run.append_eval({"step": step, "when": when, "scoring": self._config.eval_scoring, **result.to_dict()})
        score = result.score
        logger.info(
            "Step %d, %s training: %s %.4f (%d%% interval %.4f to %.4f, %d questions, %.1f s)",
            step, when, score.metric, score.score, round(100 * score.confidence), score.low, score.high, score.n,
            result.seconds,
        )  # fmt: skip


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Puts the model into evaluation mode; afterwards its mode and all random states are what they were."""
    was_training = model.training
    model.eval()
    try:
        with random_states_kept(next(model.parameters()).device), torch.no_grad():
            yield
    finally:
        model.train(was_training)


@contextmanager
def random_states_kept(device: torch.device) -> Iterator[None]:
    """Gives all random states back as they were."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    # This process's own GPU only: asking the others for their state would take memory on each of them.
    gpus = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=gpus):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
