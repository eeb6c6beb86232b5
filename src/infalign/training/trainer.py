"""TRL's `RLOOTrainer` with rollouts that do not depend on who draws them, and the KL of every sequence.

TRL gives each process random numbers of its own, so that the number of processes, or a restart with another number,
changes the training. Here the numbers belong to a rollout: (seed, step, place in the step's batch). They are those of
`rollouts.decode`, which also runs a prompt through the model once for all its rollouts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather
from numpy.typing import NDArray
from trl.models.utils import unwrap_model_for_generation
from trl.trainer.rloo_trainer import RLOOTrainer

from infalign.errors import InputError, TrainingError
from infalign.rollouts.decode import decode, uniforms
from infalign.rollouts.texts import response_texts, shown
from infalign.training.running import ADVICE


@contextmanager
def positions_from_mask(model: torch.nn.Module) -> Iterator[None]:
    """Meanwhile the model counts positions from its first real token, as it does when rollouts are drawn.

    TRL pads prompts on the left and says no positions: a model that learned absolute ones (GPT-2) then reads a short
    prompt as if it stood further back.
    """

    def tell(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        mask = kwargs.get("attention_mask")
        if mask is not None and kwargs.get("position_ids") is None:
            kwargs["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)
        return args, kwargs

    hook = model.register_forward_pre_hook(tell, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


class SequenceTrainer(RLOOTrainer):
    """`RLOOTrainer` that samples reproducibly and tells the sequence KL of each rollout.

    With vLLM, continuous batching, or weights that are spread over processes (FSDP, DeepSpeed) rollouts are TRL's own.

    Attributes:
        prompt_ids: Token ids of the prompts by their column `prompt_id`, so that each is rendered as its references
            were; None leaves that to TRL.
        on_rollouts: Called after each step's rollouts with the sequence log-ratios log π(y) − log p(y) in nats of all
            processes, in the order of the batch; what it returns is logged.
        log_ratio_B: Those of this process.
        tells_texts: A reward need not decode responses itself.
    """

    on_rollouts: Callable[[NDArray[np.float64]], dict[str, float]] | None = None
    prompt_ids: Mapping[str, list[int]] | None = None
    tells_texts = True
    _logprobs: list[torch.Tensor] | None = None
    _inputs: Sequence[Mapping[str, Any]] = ()
    _shown_ids: Sequence[Sequence[int]] = ()  # of the batch's prompts

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[Any, Any, Any]:
        if self.prompt_ids is None or any("prompt_id" not in row for row in self._inputs):
            found = super()._tokenize_prompts(prompts)
        else:
            found = [list(self.prompt_ids[row["prompt_id"]]) for row in self._inputs], None, {}
        self._shown_ids = found[0]
        return found

    def _generate_single_turn(self, prompt_ids: Any, images: Any, multimodal_fields: Any) -> list[list[int]]:
        elsewhere = self.use_vllm or self.use_transformers_continuous_batching
        if elsewhere or images is not None or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return super()._generate_single_turn(prompt_ids, images, multimodal_fields)
        prompts = [list(ids) for ids in prompt_ids]
        groups = [(ids, len(list(same))) for ids, same in groupby(prompts)]
        step = f"training step {self.state.global_step}"
        assert self.max_completion_length is not None, "always set"
        options: Any = self.args.gradient_checkpointing_kwargs
        first = self.accelerator.process_index * len(prompts)
        uniforms_BT = np.stack(
            [uniforms(self.args.seed, step, first + row, self.max_completion_length) for row in range(len(prompts))]
        )
        with unwrap_model_for_generation(
            self.model_wrapped,
            self.accelerator,
            gradient_checkpointing_kwargs=options,
            generation_kwargs=self.generation_kwargs,
        ) as unwrapped:
            model: Any = unwrapped.get_base_model() if hasattr(unwrapped, "peft_config") else unwrapped
            try:
                drawn = decode(
                    model,
                    [ids for ids, _ in groups],
                    np.repeat(np.arange(len(groups)), [count for _, count in groups]),
                    uniforms_BT,
                    end_tokens=self.eos_token_ids,
                )
            except InputError as error:  # it was a usable model when the training began
                raise TrainingError(error.what, where="training", hint=ADVICE) from error
        return [one.token_ids for one in drawn]

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        with positions_from_mask(model):
            found = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        if self._logprobs is not None:
            self._logprobs.append(found[0])
        return found

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> torch.Tensor:
        # TRL decodes a response alone, which is not what the references were scored on.
        ends = set(self.eos_token_ids)
        responses = [ids[:-1] if len(ids) and ids[-1] in ends else ids for ids in completion_ids_list]
        texts = response_texts(self.processing_class, self._shown_ids, responses)
        return super()._calculate_rewards(inputs, *shown(prompts, texts), completion_ids_list)

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        self._logprobs, self._inputs = [], inputs
        scored = super()._generate_and_score_completions(inputs)
        (policy_BT, ref_BT), self._logprobs = self._logprobs, None  # in the order in which TRL computes them
        self.log_ratio_B = ((policy_BT - ref_BT) * scored["completion_mask"]).sum(1)
        if self.on_rollouts is not None and self.model is not None and self.model.training:
            log_ratios: Any = gather(self.log_ratio_B)
            for name, value in self.on_rollouts(log_ratios.double().cpu().numpy()).items():
                self._metrics["train"][name].append(value)
        return scored
