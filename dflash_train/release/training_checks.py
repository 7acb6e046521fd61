"""The doctor's checks against training: position limit, target, recipe, thinking mode.

What a checkpoint was trained for stands in our own metadata file; a recipe says what it will be
asked for.
"""

from dflash_train.drafter.config import DrafterConfig
from dflash_train.drafter.metadata import METADATA_NAME
from dflash_train.release.config_checks import text_config
from dflash_train.release.finding import Finding, Patient, demand, ok, skipped, warning
from dflash_train.training.initial_weights import contradictions


def check_positions(patient: Patient) -> Finding:
    """Check that the position limit covers what the recipe serves, and the target's own limit."""
    limit = patient.value("max_position_embeddings", int)
    longest = _longest_request(patient)
    demand(
        longest is None or longest <= limit,
        f"max_position_embeddings (={limit}) is below the {longest} tokens of a request with its "
        "answer, and servers stop or go wrong there.",
        remedy="Write the limit that training used, the target's.",
    )
    own = None
    if patient.target is not None:
        own = text_config(patient.target).max_position_embeddings
    if own is not None and limit < own:
        return warning(
            f"max_position_embeddings (={limit}) is below the target's {own}.",
            remedy=f"Serve contexts of at most {limit} tokens.",
        )
    return ok(f"{limit} tokens" + ("." if own is None else f", the target's limit is {own}."))


def _longest_request(patient: Patient) -> int | None:
    """Give the most tokens of prompt and answer, by recipe and stored answers; None if unknown."""
    lengths = [] if patient.answers is None else [patient.answers.longest]
    if patient.recipe is not None:
        data = patient.recipe.data
        lengths.append(data.max_prompt_tokens + data.max_new_tokens)
    return max(lengths, default=None)


def check_origin(patient: Patient) -> Finding:
    """Check that the target is the one which our own metadata name: its tokens, its revision."""
    assert patient.target is not None
    known = None if patient.metadata is None else patient.metadata.target
    if known is None:
        return skipped(f"{METADATA_NAME} does not name a target")
    found = patient.target.describe()
    demand(
        known.get("tokenizer", found["tokenizer"]) == found["tokenizer"],
        f"{METADATA_NAME}: the drafter was trained with the vocabulary of {known.get('name')}, "
        "and this target's is another, so token ids do not mean the same.",
        remedy="Give the target that this drafter was trained for, with its own tokenizer.",
    )
    ids = patient.value("dflash_config.target_layer_ids", list)
    demand(
        known.get("target_layer_ids", ids) == ids,
        f"dflash_config.target_layer_ids (={ids}) are not the {known.get('target_layer_ids')} "
        "whose features it was trained on.",
        remedy="Set them to those of training.",
    )
    named = ("name", "revision", "dtype", "chat_template")
    other = [
        f"{key} {_short(known[key])}" for key in named if known.get(key, found[key]) != found[key]
    ]
    if other:
        return warning(
            f"trained on {', '.join(other)}; this target differs there, which shifts its features "
            "or its prompts.",
            remedy="Serve it with the target of training, or measure it with this one.",
        )
    return ok(
        f"the target of training: {known['name']}, {known.get('revision', 'revision unknown')}."
    )


def _short(value: object) -> str:
    return str(value).removeprefix("sha256:")[:32]


def check_recipe(patient: Patient) -> Finding:
    """Check that the drafter is the one that the recipe describes, field by field."""
    assert patient.recipe is not None
    assert patient.target is not None
    wanted = DrafterConfig.for_target(patient.recipe.drafter, text_config(patient.target))
    listed = contradictions(patient.drafter.config, wanted)
    values = [f"{each.name} is {each.found}, in the recipe {each.wanted}" for each in listed]
    demand(
        not listed,
        f"this is not the drafter of recipe {patient.recipe.name}: {'; '.join(values)}.",
        remedy="Give the recipe that trained it; target=NAME instead of recipe= skips this check.",
    )
    return ok(f"the drafter that recipe {patient.recipe.name} describes.")


def check_thinking(patient: Patient) -> Finding:
    """Check that the drafter learnt from answers of the mode in which the recipe serves."""
    assert patient.recipe is not None
    if patient.metadata is None or patient.metadata.target is None:
        return skipped(f"{METADATA_NAME} does not say how it was trained")
    trained = patient.metadata.thinking
    served = patient.recipe.data.serving_sampling.enable_thinking
    spelt = {True: "with thinking", False: "without thinking", None: "as the template chooses"}
    demand(
        trained is None or served is None or trained == served,
        f"trained on answers {spelt[trained]}, and data.serving_sampling.enable_thinking "
        f"(={served}) serves {spelt[served]}: most drafts will be rejected.",
        remedy="Serve the mode of training, or train a drafter on answers of this one.",
    )
    if trained != served:
        return warning(
            f"trained on answers {spelt[trained]}, the recipe serves them {spelt[served]}.",
            remedy="Set data.serving_sampling.enable_thinking to what the server sends.",
        )
    return ok(f"trained and served {spelt[trained]}.")
