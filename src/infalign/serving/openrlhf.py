"""OpenRLHF's remote reward protocol: which prompt a text stands for, and which part of it is the response.

The trainer sends texts: `prompts`, rendered by its chat template, and `query`, the decoded tokens of prompt and
response together with the special tokens. Calibration belongs to a prompt, so each text must be one of the run's
training prompts exactly as the reference policy was shown it.
"""

from __future__ import annotations

from typing import Any

from infalign.data import Prompt, PromptSet
from infalign.errors import InputError
from infalign.rollouts.template_errors import explaining
from infalign.rollouts.tokens import excerpt, require_chat_template
from infalign.wording import counted


class PromptTexts:
    """The run's prompts by the text that the policy is shown.

    Args:
        prompts: The run's training prompts.
        tokenizer: The reference policy's.

    Raises:
        InputError: If a prompt is messages and the tokenizer has no chat template.
    """

    def __init__(self, prompts: PromptSet, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._id_of = {self._shown(prompt): prompt.id for prompt in prompts}
        added = tokenizer.added_tokens_decoder.values()
        self._special = {*tokenizer.all_special_tokens, *(token.content for token in added if token.special)}

    def prompt_id(self, text: str) -> str:
        """The id of the prompt that is shown as `text`.

        Raises:
            InputError: If none is.
        """
        if text not in self._id_of:
            raise InputError(
                f"this is not among the run's {counted(len(self._id_of), 'training prompt')}: {excerpt(text)}",
                where="prompts",
                hint="Train on the run's prompts, with the reference policy's own chat template and no other template",
            )
        return self._id_of[text]

    def response(self, query: str, text: str) -> str:
        """The response in a decoded `query` to the prompt shown as `text`, without special tokens, as calibrated.

        Raises:
            InputError: If the query does not begin with the prompt.
        """
        for beginning in (text, self._through_tokens(text)):
            if query.startswith(beginning):
                response = query[len(beginning) :]
                for special in self._special:
                    response = response.replace(special, "")
                return response
        raise InputError(
            f"the query does not begin with its prompt: {excerpt(query)}",
            where="query",
            hint="Leave room for the whole prompt: raise the trainer's length limit, so that prompts are not cut",
        )

    def _shown(self, prompt: Prompt) -> str:
        if isinstance(prompt.prompt, str):
            return prompt.prompt
        require_chat_template(self._tokenizer)
        with explaining(self._tokenizer):
            return self._tokenizer.apply_chat_template(prompt.prompt, add_generation_prompt=True, tokenize=False)

    def _through_tokens(self, text: str) -> str:
        """A text as it looks when it has been tokenized and decoded, which need not be what it was."""
        return self._tokenizer.decode(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
