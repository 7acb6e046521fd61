"""Where an output ends: at a stop token, or at the token that completes a stop text."""

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from dflash_inference.sampling import SamplingParams
from dflash_train.features.target import Target


def end_of_output(
    output_ids: list[int], new_ids: list[int], *, params: SamplingParams, target: Target
) -> tuple[int, bool]:
    """Find how many new tokens belong to the output.

    Args:
        output_ids: The request's output so far, which has not ended.
        new_ids: Tokens about to be committed.
        params: The request's stop tokens and texts.
        target: Whose stop tokens count if the request names none, and whose tokenizer reads text.

    Returns:
        The number of new tokens up to the end, the one that ends it included; whether it ends.
    """
    stops = target.stop_token_ids if params.stop_token_ids is None else params.stop_token_ids
    for number, token in enumerate(new_ids, start=1):
        is_complete = token in stops
        if not is_complete and params.stop:
            is_complete = _ends_with_stop(
                [*output_ids, *new_ids[:number]], params.stop, target.tokenizer
            )
        if is_complete:
            return number, True
    return len(new_ids), False


def _ends_with_stop(
    output_ids: list[int], stop: tuple[str, ...], tokenizer: PreTrainedTokenizerBase
) -> bool:
    """Say whether the text of an output holds a stop text.

    Only its end is read: a text of n characters lies within the last n tokens that show any, and a
    character of several bytes may need three tokens more.
    """
    longest = max(map(len, stop))
    text = tokenizer.decode(output_ids[-(4 * longest + 4) :])
    return any(each in text for each in stop)
