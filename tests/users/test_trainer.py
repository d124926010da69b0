"""transformers' Trainer: what it evaluates between epochs is what it evaluates of the plain model."""

import pytest
import torch
from twins import assert_close, assert_same, batch, bert, twins

import fastattn

transformers = pytest.importorskip("transformers")

pytest.importorskip("accelerate")
pytestmark = pytest.mark.usefixtures("fresh_accelerator")


def rows(count, seed, label):
    """Ragged examples; `label` makes one of a row's ids."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 24, (count,), generator=generator).tolist()
    ids = [torch.randint(3, 57, (length,), generator=generator) for length in lengths]
    return [{"input_ids": x, **label(x)} for x in ids]


def of_sequence(ids):
    return {"labels": ids.sum() % 3}


def of_tokens(ids):
    return {"labels": ids % 3}


def of_span(ids):
    return {"start_positions": torch.tensor(0), "end_positions": torch.tensor(len(ids) - 1)}


def padded(label_at_padding=-100):
    """A collator: padded to the longest row, on the right."""

    def collate(examples):
        found = {"attention_mask": [torch.ones_like(example["input_ids"]) for example in examples]}
        found.update({name: [example[name] for example in examples] for name in examples[0]})
        fill = {"input_ids": 1, "labels": label_at_padding}
        return {
            name: torch.nn.utils.rnn.pad_sequence(x, batch_first=True, padding_value=fill.get(name, 0)) if x[0].dim()
            else torch.stack(x)
            for name, x in found.items()
        }  # fmt: skip

    return collate


def trainer_of(model, directory, label=of_sequence, collate=None, callbacks=(), model_init=None, **options):
    options = {
        "per_device_train_batch_size": 4, "per_device_eval_batch_size": 8, "num_train_epochs": 3, "learning_rate": 3e-3,
        "eval_strategy": "epoch", "save_strategy": "no", "logging_strategy": "epoch", "seed": 0, **options,
    }  # fmt: skip
    arguments = transformers.TrainingArguments(str(directory), use_cpu=True, disable_tqdm=True, report_to=[], **options)
    return transformers.Trainer(
        model, arguments, data_collator=collate or padded(), train_dataset=rows(16, 1, label), eval_dataset=rows(12, 2, label),
        callbacks=list(callbacks), model_init=model_init,
    )  # fmt: skip


def curves(model, directory, before=False, **options):
    """Losses of training and evaluation at each epoch, and what the trained model evaluates to at the end."""
    trainer = trainer_of(model, directory, **options)
    losses = [trainer.evaluate()["eval_loss"]] if before else []
    trainer.train()
    for name in ("loss", "eval_loss"):
        losses += [entry[name] for entry in trainer.state.log_history if name in entry]
    return torch.tensor([*losses, trainer.evaluate()["eval_loss"], trainer.state.epoch])


def assert_same_training(plain, ours, tmp_path, **options):
    expected, actual = (curves(m, tmp_path / name, **options) for name, m in (("plain", plain), ("ours", ours)))
    assert_close(actual, expected)
    assert (expected[:-2].max() - expected[:-2].min()) > 1e-2
    assert_same(plain.eval(), ours.eval())
    return expected


def test_default_optimizer():
    assert transformers.TrainingArguments("unused", use_cpu=True).optim == "adamw_torch_fused"


CASES = {
    "sequences": (transformers.BertForSequenceClassification, of_sequence, -100),
    "tokens": (transformers.BertForTokenClassification, of_tokens, -100),
    "masked_language_model": (transformers.BertForMaskedLM, lambda ids: {"labels": torch.where(ids % 4 == 0, ids, -100)}, -100),
    "tokens_with_labels_at_padding": (transformers.BertForTokenClassification, of_tokens, 0),
    "question_answering": (transformers.BertForQuestionAnswering, of_span, -100),
}


@pytest.mark.parametrize("before", [True, False], ids=["evaluated_first", "trained_first"])
@pytest.mark.parametrize("case", CASES)
def test_evaluated_at_each_epoch(case, before, tmp_path):
    cls, label, label_at_padding = CASES[case]
    plain, ours, handle = twins(bert(cls, **({} if "language" in case or "question" in case else {"num_labels": 3})))
    assert_same_training(plain, ours, tmp_path, before=before, label=label, collate=padded(label_at_padding))
    assert not handle.report.left
    if cls is transformers.BertForSequenceClassification:
        assert not handle.report.fallbacks


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"optim": "adamw_torch"},
        {"optim": "sgd", "learning_rate": 0.05},
        {"optim": "adafactor"},
        {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1},
        {"weight_decay": 0.1, "lr_scheduler_type": "cosine", "warmup_steps": 2},
        {"torch_empty_cache_steps": 1, "auto_find_batch_size": True},
    ],
    ids=lambda options: "-".join(f"{name}={value}" for name, value in options.items()),
)
def test_options_of_the_training(options, tmp_path):
    plain, ours, handle = twins(bert(transformers.BertForSequenceClassification, num_labels=3))
    assert_same_training(plain, ours, tmp_path, before=True, **options)
    assert not handle.report.fallbacks


def test_early_stopping_and_the_best_model_loaded_at_the_end(tmp_path):
    """It overfits at once: training stops before the last epoch, and the weights of an earlier one are written back."""
    plain, ours, _ = twins(bert(transformers.BertForSequenceClassification, num_labels=3))
    options = {
        "num_train_epochs": 8, "learning_rate": 2e-2, "save_strategy": "epoch", "save_total_limit": 1,
        "load_best_model_at_end": True, "metric_for_best_model": "eval_loss",
    }  # fmt: skip
    found = []
    for name, model in (("plain", plain), ("ours", ours)):
        trainer = trainer_of(model, tmp_path / name, callbacks=[transformers.EarlyStoppingCallback(1)], **options)
        trainer.train()
        losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        found.append(torch.tensor([*losses, trainer.state.best_metric, trainer.evaluate()["eval_loss"]]))
        assert found[-1][-1] == pytest.approx(min(losses), rel=2e-5)
    assert found[0].shape == found[1].shape and len(found[0]) < 10
    assert_close(found[1], found[0])
    assert_same(plain.eval(), ours.eval())


def test_predictions_and_a_model_saved_and_loaded(tmp_path):
    plain, ours, _ = twins(bert(transformers.BertForTokenClassification, num_labels=3))
    found = []
    for name, model in (("plain", plain), ("ours", ours)):
        trainer = trainer_of(model, tmp_path / name, label=of_tokens)
        trainer.predict(trainer.eval_dataset)
        trainer.train()
        predicted = trainer.predict(trainer.eval_dataset)
        keep = torch.tensor(predicted.label_ids != -100)
        found.append(torch.tensor(predicted.predictions)[keep])
        trainer.save_model(tmp_path / name / "saved")
        assert_same(type(model).from_pretrained(tmp_path / name / "saved").eval(), model.eval())
    assert_close(found[1], found[0])


def test_resumed_from_a_checkpoint(tmp_path):
    plain, ours, _ = twins(bert(transformers.BertForSequenceClassification, num_labels=3))
    found = []
    for name, model in (("plain", plain), ("ours", ours)):
        options = {"save_strategy": "epoch", "num_train_epochs": 2}
        trainer_of(model, tmp_path / name, **options).train()
        trainer = trainer_of(model, tmp_path / name, **{**options, "num_train_epochs": 3})
        trainer.evaluate()
        trainer.train(resume_from_checkpoint=str(tmp_path / name / "checkpoint-4"))
        found.append(torch.tensor([entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]))
    assert len(found[0]) == 3
    assert_close(found[1], found[0])


def test_in_bfloat16(tmp_path):
    """Mixed precision: losses as near to the fp32 ones as the plain model's, and in fp32 as the plain model's are."""
    plain, ours, _ = twins(bert(transformers.BertForSequenceClassification, num_labels=3))
    exact, _, _ = twins(bert(transformers.BertForSequenceClassification, num_labels=3))
    found = [curves(m, tmp_path / str(i), bf16=i > 0, learning_rate=5e-4) for i, m in enumerate((exact, plain, ours))]
    assert (found[2] - found[0]).abs().max() <= 2 * (found[1] - found[0]).abs().max()


def test_model_init_and_a_callback_that_evaluates_between_steps(tmp_path):
    """The model made and accelerated inside of the Trainer, evaluated after every step."""

    def accelerated():
        model = bert(transformers.BertForSequenceClassification, num_labels=3)
        fastattn.accelerate(model)
        return model

    class Peek(transformers.TrainerCallback):
        def __init__(self):
            self.seen = []

        def on_step_end(self, args, state, control, model, **kwargs):
            model.eval()
            with torch.no_grad():
                self.seen.append(model(**batch()).logits)
            model.train()

    found = []
    for name, make in (("plain", lambda: bert(transformers.BertForSequenceClassification, num_labels=3)), ("ours", accelerated)):
        peek = Peek()
        trainer_of(None, tmp_path / name, callbacks=[peek], model_init=make, eval_strategy="no").train()
        found.append(torch.stack(peek.seen))
    assert len(found[0]) == 12
    assert_close(found[1], found[0])
