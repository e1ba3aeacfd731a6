"""Real VLMs of transformers at tiny size with random weights, saved like published ones."""

import json
from pathlib import Path

import torch
from tiny_clip import vary
from tiny_pipelines.qwen_image import qwen_text_encoder
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLImageProcessor,
    Qwen2VLModel,
)


WORDS = ["Yes", "No", "A", "B"]

# Each word is one token. In a line, its token includes the space before it.
TEXT = [*WORDS, "user", "assistant", "Does this image match the caption? Answer Yes or No.", "Very Good"]

# Published checkpoints, such as Qwen's, have settings like these. They must not change a score.
GENERATION = {"do_sample": True, "repetition_penalty": 1.5, "temperature": 0.1, "top_k": 1, "top_p": 0.1}


def qwen2_5_vl(folder: Path, seed: int = 0) -> None:
    """Rotary positions in three dimensions, 4 to 16 tokens per image, by its size. The processor also takes videos."""
    special = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = _tokenizer(special)
    prompt = "<|im_start|>assistant\n"
    tokenizer.chat_template = _chat_template(
        "<|im_start|>user\n", "<|vision_start|><|image_pad|><|vision_end|>", "<|im_end|>\n", prompt
    )
    torch.manual_seed(seed)
    model = qwen_text_encoder(tokenizer)
    Qwen2VLImageProcessor(size={"shortest_edge": 4 * 28**2, "longest_edge": 16 * 28**2}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _save_model(model, tokenizer, prompt, folder)


def qwen2_vl(folder: Path) -> Qwen2VLModel:
    """
    Save the config and the processor of a model, whose vocabulary has room for one more token; return the model, without a
    head.
    """
    special = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = _tokenizer(special)
    tokenizer.chat_template = _chat_template(
        "<|im_start|>user\n", "<|vision_start|><|image_pad|><|vision_end|>", "<|im_end|>\n", "<|im_start|>assistant\n"
    )
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer) + 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2},
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    )
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessor().save_pretrained(folder)
    torch.manual_seed(0)
    return vary(Qwen2VLModel(config))


def llava(folder: Path, seed: int = 0) -> None:
    """Rotary positions in one dimension, 16 tokens per image."""
    tokenizer = _tokenizer(["<image>"], pad_token="<|endoftext|>")
    prompt = "ASSISTANT:"
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, image_size=32, patch_size=8, projection_dim=16),
        text_config=LlamaConfig(
            **sizes, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, initializer_range=0.5
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    model = LlavaForConditionalGeneration(config)
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_chat_template("USER: ", "<image>\n", " ", prompt),
    )
    processor.save_pretrained(folder)
    _save_model(model, tokenizer, prompt, folder)


def _tokenizer(special: list[str], **options) -> Qwen2Tokenizer:
    blank = Qwen2Tokenizer(extra_special_tokens=special, **options)
    return blank.train_new_from_iterator(TEXT, vocab_size=1000, show_progress=False)


def _chat_template(start: str, image: str, end: str, prompt: str) -> str:
    return (
        "{% for message in messages %}{% if message['role'] == 'assistant' %}"
        + prompt
        + "{% else %}"
        + start
        + "{% endif %}"
        "{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}" + image + "{% else %}{{ part['text'] }}{% endif %}"
        "{% endfor %}" + end + "{% endfor %}{% if add_generation_prompt %}" + prompt + "{% endif %}"
    )


@torch.no_grad()
def _save_model(model: PreTrainedModel, tokenizer: Qwen2Tokenizer, prompt: str, folder: Path) -> None:
    # A trained VLM would answer one of the words: make their logits large and alike after the prompt, all others small.
    inputs = tokenizer(prompt, return_tensors="pt")
    model.get_input_embeddings().weight[inputs.input_ids[0, -1]] *= 16  # so that the answer depends little on the image
    hidden = model.eval()(**inputs, output_hidden_states=True).hidden_states[-1][0, -1]
    words = [tokenizer.convert_tokens_to_ids(word) for word in WORDS]
    answers = model.lm_head.weight[words] + 2 * hidden
    model.lm_head.weight *= 0.1
    model.lm_head.weight[words] = answers
    model.save_pretrained(folder)
    with open(folder / "generation_config.json", "w") as file:
        json.dump(GENERATION, file)
