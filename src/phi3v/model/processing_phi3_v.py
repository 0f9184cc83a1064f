"""Text with image tags and images, turned into what the model takes."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tokenizers import Tokenizer
from transformers import BatchFeature, PreTrainedTokenizerFast
from transformers.processing_utils import ProcessorMixin
from transformers.utils.hub import cached_file

from ..errors import CheckpointError
from .image_processing_phi3_v import Phi3VImageProcessor, size_of

IMAGE_TAG = re.compile(r"<\|image_(\d+)\|>")
IMAGE_TOKEN = "<|image|>"
END_OF_TEXT = "<|endoftext|>"
END_OF_TURN = "<|end|>"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
PADDING = (True, False, "longest", "do_not_pad")
PUBLISHED_CHAT_TEMPLATE = (
    "{% for message in messages %}{{'<|' + message['role'] + '|>' + '\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt and messages[-1]['role'] != 'assistant' %}{{- '<|assistant|>\n' -}}"
    "{% endif %}"
)
CHAT_TEMPLATE = (
    "{% set images = namespace(count=0) %}{% for message in messages %}{{ '<|' + message['role'] + '|>\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% elif part['type'] == 'image' %}"
    "{% set images.count = images.count + 1 %}{{ '<|image_' + images.count|string + '|>\n' }}"
    "{% else %}{{ raise_exception('a message may hold text and image parts only') }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt and messages[-1]['role'] != 'assistant' %}{{- '<|assistant|>\n' -}}"
    "{% endif %}"
)
"""The published template, and also messages made of parts, whose images it numbers over the whole conversation."""


class Phi3VProcessor(ProcessorMixin):
    """Tokenizes the published chat format around images.

    The text is split at its image tags and each piece is tokenized on its own, with its own ``<s>``; every position of
    an image holds the id of ``<|image|>``.

    Args:
        image_processor: cuts images into crops.
        tokenizer: the tokenizer exactly as ``tokenizer.json`` defines it. (transformers' own ``LlamaTokenizer`` class
            rebuilds the pre-tokenizer and yields other ids than the published model was trained on.)

    Source: published processor; ids and counts checked against recordings of it in ``tests/parity``.
    """

    def __init__(
        self,
        image_processor: Phi3VImageProcessor,
        tokenizer: PreTrainedTokenizerFast,
        chat_template: str | None = None,
    ) -> None:
        if chat_template is None:
            is_published = tokenizer.chat_template == PUBLISHED_CHAT_TEMPLATE
            chat_template = CHAT_TEMPLATE if is_published else tokenizer.chat_template  # pyright: ignore
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.image_token_id = self._special_id(IMAGE_TOKEN)
        self.stop_token_ids = [self._special_id(END_OF_TEXT), self._special_id(END_OF_TURN)]
        self.bos_token_id = self._special_id("<s>")
        self._published_files: dict[str, bytes] = {}

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]

    def _special_id(self, token: str) -> int:
        token_id = self.tokenizer.convert_tokens_to_ids(token)
        if token_id is None or token_id == self.tokenizer.unk_token_id:
            raise CheckpointError(f"the tokenizer has no {token}: this is not a Phi-3-vision tokenizer.json")
        return token_id

    @property
    def num_crops(self) -> int:
        """Most tiles an image may take."""
        return self.image_processor.num_crops

    def image_order(self, text: str) -> list[int]:
        """Returns the zero-based image indices in the order their tags stand in the text.

        Raises:
            ValueError: the tags are not 1..n, each exactly once.
        """
        numbers = [int(number) for number in IMAGE_TAG.findall(text)]
        if sorted(numbers) != list(range(1, len(numbers) + 1)):
            raise ValueError(
                f"image tags must be numbered from <|image_1|> without gaps, each once; the text holds {numbers}"
            )
        return [number - 1 for number in numbers]

    def encode(self, text: str, image_token_counts: Sequence[int] = (), add_bos: bool = True) -> list[int]:
        """Returns the ids of one text.

        Args:
            text: may hold tags ``<|image_k|>``; each becomes ``image_token_counts[k - 1]`` image positions.
            image_token_counts: decoder positions of every image that the conversation numbers.
            add_bos: put ``<s>`` before the first piece, as at the start of a conversation. The piece after an image
                always has its own ``<s>``.

        Raises:
            ValueError: the text itself holds ``<|image|>``, which would be taken for a position of an image.
        """
        if IMAGE_TOKEN in text:
            raise ValueError(f"the text holds {IMAGE_TOKEN}, which stands for image positions; tags are <|image_1|>")
        pieces = IMAGE_TAG.split(text)
        ids = [self.bos_token_id] if add_bos else []
        ids += self.tokenizer.encode(pieces[0], add_special_tokens=False)
        for number, piece in zip(pieces[1::2], pieces[2::2], strict=True):
            ids += [self.image_token_id] * image_token_counts[int(number) - 1]
            ids.append(self.bos_token_id)
            ids += self.tokenizer.encode(piece, add_special_tokens=False)
        return ids

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]  # text first, as in the published processor
        self,
        text: str | Sequence[str],
        images: Image.Image | Sequence[Any] | None = None,
        return_tensors: str | None = "pt",
        padding: bool | str = True,
        padding_side: str | None = None,
        num_crops: int | None = None,
        **unsupported: Any,
    ) -> BatchFeature:
        """Encodes one text or a batch of texts with their images.

        Args:
            text: one prompt or several, image tags numbered from 1 in each.
            images: the images, in tag number order: one image, a flat list shared out by each text's number of tags,
                or a list of lists.
            return_tensors: ``"pt"``, ``"np"`` or None.
            padding: True or ``"longest"``: pad to the longest text; False or ``"do_not_pad"``: texts keep their
                lengths, which needs ``return_tensors=None`` where they differ.
            padding_side: ``"left"`` for generation in batches; default the tokenizer's own side.
            num_crops: overrides the image processor's own.
            unsupported: keywords that callers of any processor pass as None, such as ``videos``.

        Returns:
            ``input_ids`` and ``attention_mask``: (B, L). With images also ``pixel_values``: (N, C, 3, crop, crop) and
            ``image_sizes``: (N, 2), in the order the images stand in the texts.

        Raises:
            ValueError: tags and images do not match, naming the text; or another ``padding``.
            TypeError: a keyword that this processor does not know.
        """
        given = sorted(key for key, value in unsupported.items() if value is not None)
        if given:
            raise TypeError(f"Phi3VProcessor does not take {', '.join(given)}")
        if padding not in PADDING:
            raise ValueError(f"padding is {padding!r}, must be one of {', '.join(map(repr, PADDING))}")
        texts = [text] if isinstance(text, str) else list(text)
        shared_out = self._share_out(texts, images)
        rows: list[list[int]] = []
        ordered: list[Any] = []
        for prompt, own_images in zip(texts, shared_out, strict=True):
            counts = [self.image_processor.image_token_count(*size_of(image), num_crops) for image in own_images]
            rows.append(self.encode(prompt, counts))
            ordered += [own_images[index] for index in self.image_order(prompt)]
        data: dict[str, Any] = {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}
        if padding in (True, "longest"):
            longest = max(map(len, rows))
            side = padding_side or self.tokenizer.padding_side
            for key, fill in (("input_ids", self.tokenizer.pad_token_id), ("attention_mask", 0)):
                filling = [[fill] * (longest - len(row)) for row in rows]
                data[key] = [
                    pad + row if side == "left" else row + pad for row, pad in zip(data[key], filling, strict=True)
                ]
        encoded = BatchFeature(data, tensor_type=return_tensors)
        if ordered:
            features = self.image_processor.preprocess(ordered, num_crops=num_crops, return_tensors=return_tensors)
            encoded["pixel_values"] = features["pixel_values"]
            encoded["image_sizes"] = features["image_sizes"]
        return encoded

    def _share_out(self, texts: list[str], images: Any) -> list[list[Any]]:
        """Gives every text its own images and checks that the numbers fit."""
        wanted = [len(self.image_order(text)) for text in texts]
        if images is None:
            images = []
        elif not isinstance(images, Sequence) or isinstance(images, str):
            images = [images]
        if images and isinstance(images[0], Sequence) and not isinstance(images[0], str):
            shared_out = [list(own) for own in images]
        elif len(texts) == 1:
            shared_out = [list(images)]
        else:
            if sum(wanted) != len(images):
                raise ValueError(f"the texts hold {sum(wanted)} image tags but {len(images)} images were given")
            iterator = iter(images)
            shared_out = [[next(iterator) for _ in range(count)] for count in wanted]
        if len(shared_out) != len(texts):
            raise ValueError(f"{len(texts)} texts but {len(shared_out)} lists of images")
        for index, (own, count) in enumerate(zip(shared_out, wanted, strict=True)):
            if len(own) != count:
                raise ValueError(f"text {index} holds {count} image tags but {len(own)} images were given for it")
        return shared_out

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values", "image_sizes"]

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        pretrained_model_name_or_path: str | Path,
        num_crops: int | None = None,
        padding_side: str | None = None,
        **kwargs: Any,
    ) -> "Phi3VProcessor":
        """Loads a published-layout folder or hub id; never asks for or runs remote code.

        Args:
            num_crops: overrides ``preprocessor_config.json``'s.
            padding_side: overrides ``tokenizer_config.json``'s.
            kwargs: ``cache_dir``, ``revision``, ``token``, ``local_files_only``, ``subfolder``, ``force_download``.

        Raises:
            OSError: a file is missing, named with its folder.
        """
        wanted = ("cache_dir", "revision", "token", "local_files_only", "subfolder", "force_download")
        hub = {key: value for key, value in kwargs.items() if key in wanted and value is not None}
        overrides = {} if num_crops is None else {"num_crops": num_crops}
        image_processor = Phi3VImageProcessor.from_pretrained(pretrained_model_name_or_path, **overrides, **hub)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(pretrained_model_name_or_path, **hub)
        tokenizer.padding_side = padding_side or tokenizer.padding_side
        processor = cls(image_processor, tokenizer)
        for name in TOKENIZER_FILES:
            file = cached_file(pretrained_model_name_or_path, name, _raise_exceptions_for_missing_entries=False, **hub)
            if file is not None:
                processor._published_files[name] = Path(file).read_bytes()
        return processor

    def save_pretrained(self, save_directory: str | Path) -> list[str]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Writes the published files: ``preprocessor_config.json`` and the tokenizer's.

        An unchanged tokenizer's files are written byte for byte as they were read (today's library would rewrite
        ``tokenizer.json`` in a form that the published code's library cannot read); only the pointer to remote code
        is left out of ``tokenizer_config.json``. A changed tokenizer is written in the library's current form.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.image_processor.save_pretrained(folder)
        if not self._is_tokenizer_as_read():
            self.tokenizer.save_pretrained(folder)
            return [str(path) for path in sorted(folder.iterdir())]
        for name, content in self._published_files.items():
            if name == "tokenizer_config.json":
                settings = json.loads(content)
                settings.pop("auto_map", None)
                content = (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode()
            (folder / name).write_bytes(content)
        return [str(path) for path in sorted(folder.iterdir())]

    def _is_tokenizer_as_read(self) -> bool:
        if "tokenizer.json" not in self._published_files:
            return False
        as_read = Tokenizer.from_buffer(self._published_files["tokenizer.json"])
        now = self.tokenizer.backend_tokenizer
        settings = json.loads(self._published_files.get("tokenizer_config.json", b"{}"))
        return as_read.get_vocab(with_added_tokens=True) == now.get_vocab(
            with_added_tokens=True
        ) and self.tokenizer.chat_template == settings.get("chat_template")
