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
from phi3v.eval.run import evaluate_model
from phi3v.model.processing_phi3_v import Phi3VProcessor
from phi3v.runlog import EvalMoment, RunDirectory
from phi3v.train.callbacks import SCORE_KEY
from phi3v.train.tuning import Precision

logger = logging.getLogger(__name__)


class Scorer:
    """Takes scores of the model in training, in the precision it trains in, and records them.

    With several processes the first one answers all questions, and the others wait for its score.

    Args:
        model: the model, not wrapped for distributed training.
        processor: its processor.
        dataset: checked evaluation samples.
        config: metric, batch size and limits.
        precision: what training computes in.
        args: says which process this is.
        run: where the results go.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        processor: Phi3VProcessor,
        dataset: ConversationDataset,
        *,
        config: TrainConfig,
        precision: Precision,
        args: TrainingArguments,
        run: RunDirectory,
    ) -> None:
        self._model = model
        self._processor = processor
        self._dataset = dataset
        self._config = config
        self._precision = precision
        self._args = args
        self._run = run

    def score(self, step: int, when: EvalMoment, *, may_reuse: bool = True) -> float:
        """Takes and records the score of the model as it is; every process gets it.

        A score of the same weights that is on record is taken over: the one from before training when a run starts
        again, and a mid-run one after training.

        Args:
            step: optimizer steps that the model has behind it.
            when: ``before``, ``during`` or ``after`` training.
            may_reuse: False when the weights are not those that a mid-run score of this step was taken of.
        """
        score = [self._recorded_or_taken(step, when, may_reuse) if self._args.process_index == 0 else None]
        if self._args.world_size > 1:
            broadcast_object_list(score)
        (value,) = score
        assert value is not None
        return value

    def score_during(self, step: int) -> dict[str, float]:
        """Takes a mid-run score; returns what Trainer logs."""
        return {SCORE_KEY: self.score(step, "during")}

    def _recorded_or_taken(self, step: int, when: EvalMoment, may_reuse: bool) -> float:
        if when == "before" and (line := self._run.evaluation("before")) is not None:
            return line["score"]
        if when == "after" and may_reuse:
            for line in self._run.evals():
                if line["when"] == "during" and line["step"] == step:
                    self._run.append_eval({**line, "when": "after"})
                    return line["score"]
        return self._evaluate(step, when)

    def _evaluate(self, step: int, when: EvalMoment) -> float:
        config = self._config
        with undisturbed(self._model), self._precision.autocast(self._args.device):
            result = evaluate_model(
                self._model,
                self._processor,
                self._dataset,
                metric=config.eval_metric,
                batch_size=config.eval_batch_size,
                max_new_tokens=config.eval_max_new_tokens,
                limit=config.eval_limit,
                seed=config.seed,
                progress=True,
            )
        score = result.score
        # The predictions first: a line of eval.jsonl says that they are there.
        self._run.write_predictions(step, result.rows)
        self._run.append_eval(
            {
                "step": step,
                "when": when,
                "metric": score.metric,
                "score": score.score,
                "low": score.low,
                "high": score.high,
                "confidence": score.confidence,
                "n": score.n,
                "seconds": result.seconds,
            }
        )
        logger.info(
            "Step %d, %s training: %s %.4f (%d%% interval %.4f to %.4f, %d questions, %.1f s)",
            step, when, score.metric, score.score, round(100 * score.confidence), score.low, score.high, score.n,
            result.seconds,
        )  # fmt: skip
        return score.score


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Puts the model into evaluation mode; afterwards its mode and all random states are what they were."""
    was_training = model.training
    python_state, numpy_state = random.getstate(), np.random.get_state()
    model.eval()
    try:
        with torch.random.fork_rng(), torch.no_grad():
            yield
    finally:
        model.train(was_training)
        random.setstate(python_state)
        np.random.set_state(numpy_state)
