"""OpenRLHF's remote reward protocol: which prompt a text stands for, and which part of it is the response.

The trainer sends texts: `prompts`, rendered by its chat template, and `query`, the decoded tokens of prompt and
response together with the special tokens. Calibration belongs to a prompt, so each text must be one of the run's
training prompts exactly as the reference policy was shown it; and the response must read as the references did, whether
the trainer decodes it with its prompt or alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from infalign._io.wording import counted
from infalign.errors import InputError
from infalign.rollouts.fill import encoded_responses
from infalign.rollouts.prompts import Prompt, PromptSet
from infalign.rollouts.rendering import rendered_text
from infalign.rollouts.tokens import excerpt


class PromptTexts:
    """The run's prompts by the text that the policy is shown.

    Args:
        prompts: The run's training prompts.
        tokenizer: The reference policy's.
        references: Texts of reference responses, which tell how a response begins.

    Raises:
        InputError: If a prompt is messages and the tokenizer has no chat template.
    """

    def __init__(self, prompts: PromptSet, tokenizer: Any, references: Iterable[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._id_of = {self._shown(prompt): prompt.id for prompt in prompts}
        added = tokenizer.added_tokens_decoder.values()
        special = {*tokenizer.all_special_tokens, *(token.content for token in added if token.special)}
        # Some decoders write spaces between all tokens, special ones among them.
        self._special = [f" {one}" for one in special if self._spaced(one)] + sorted(special)
        said = [text for text in references if text]
        spaced = bool(said) and all(text.startswith(" ") for text in said)
        self._begins_with_space = spaced and self._drops_space(said[0])

    def prompt_id(self, text: str) -> str:
        """The id of the prompt that is shown as `text`.

        Raises:
            InputError: If none is.
        """
        if text not in self._id_of:
            raise InputError(
                f"this is not among the run's {counted(len(self._id_of), 'training prompt')}: {excerpt(text)}",
                where="prompts",
                hint="Train on the run's prompts, with the reference policy's own chat template and no other template; "
                "one that writes the date must be told the run's, rendered_at in prompts/train.jsonl",
            )
        return self._id_of[text]

    def response(self, query: str, text: str) -> str:
        """The response in a decoded `query` to the prompt shown as `text`, without special tokens, as calibrated.

        Raises:
            InputError: If the query does not begin with the prompt.
        """
        beginnings = (text, self._through_tokens(text), self._through_tokens(text, dressed=True))
        for beginning in beginnings:
            if query.startswith(beginning):
                response = query[len(beginning) :]
                for special in self._special:
                    response = response.replace(special, "")
                # Decoded alone, it has lost the space that every reference begins with.
                lost = self._begins_with_space and response and not response[0].isspace()
                return f" {response}" if lost else response
        raise InputError(
            f"the query does not begin with its prompt: {excerpt(query)}",
            where="query",
            hint="Leave room for the whole prompt: raise the trainer's length limit, so that prompts are not cut",
        )

    def _shown(self, prompt: Prompt) -> str:
        if isinstance(prompt.prompt, str):
            return prompt.prompt
        return rendered_text(self._tokenizer, prompt.prompt, to_answer=True, at=prompt.rendered_at)

    def _through_tokens(self, text: str, *, dressed: bool = False) -> str:
        """A text as it looks when it has been tokenized and decoded, which need not be what it was.

        Args:
            text: The text.
            dressed: Tokenize it with the special tokens that begin a text, such as a beginning-of-sequence token.
        """
        tokenizer = self._tokenizer
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if dressed:
            whole = tokenizer(text, verbose=False)["input_ids"]
            start = next((at for at in range(len(whole)) if whole[at : at + len(ids)] == ids), 0)
            ids = whole[: start + len(ids)]
        return tokenizer.decode(ids)

    def _drops_space(self, text: str) -> bool:
        """Whether a response that begins with a space would lose it, decoded alone."""
        return not self._tokenizer.decode(encoded_responses(self._tokenizer, [text])[0]).startswith(" ")

    def _spaced(self, special: str) -> bool:
        """Whether the decoder writes a space between a text and this special token behind it."""
        some = next(iter(self._id_of))
        ids = self._tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"]
        end = self._tokenizer.convert_tokens_to_ids(special)
        return self._tokenizer.decode([*ids, end]) == f"{self._tokenizer.decode(ids)} {special}"
