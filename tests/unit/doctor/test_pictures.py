"""One image file: its header's facts, damage, and hashes that stay when a picture is only re-encoded."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from planted import as_jpeg, picture

from phi3v.data.images import UnusableImageError
from phi3v.doctor.pictures import HASHED_PX, difference_hash, frequency_hash, look_at
from phi3v.doctor.twins import MOST_DHASH_BITS, MOST_PHASH_BITS


def are_near(one: Path, other: Path) -> bool:
    first, second = (look_at(path, decode=False, hashes=True) for path in (one, other))
    return (first.phash ^ second.phash).bit_count() <= MOST_PHASH_BITS and (
        first.dhash ^ second.dhash
    ).bit_count() <= MOST_DHASH_BITS


def test_the_frequency_hash_is_that_of_the_plain_cosine_transform() -> None:
    pixels = np.random.default_rng(0).uniform(0, 255, (HASHED_PX, HASHED_PX))
    places = np.arange(HASHED_PX)
    bits = []
    frequencies = np.zeros((8, 8))
    for row in range(8):
        for column in range(8):
            wave = np.outer(
                np.cos(np.pi * row * (places + 0.5) / HASHED_PX), np.cos(np.pi * column * (places + 0.5) / HASHED_PX)
            )
            frequencies[row, column] = (pixels * wave).sum()
    median = np.median(frequencies.ravel()[1:])
    bits = "".join(str(int(value > median)) for value in frequencies.ravel())
    assert frequency_hash(pixels) == int(bits, 2)


def test_the_difference_hash_compares_each_cell_with_the_next_one() -> None:
    pixels = np.random.default_rng(0).uniform(0, 255, (HASHED_PX, HASHED_PX))
    edge = HASHED_PX // 8
    cells = [[pixels[r * edge : (r + 1) * edge, c * edge : (c + 1) * edge].mean() for c in range(8)] for r in range(8)]
    bits = "".join(str(int(cells[r][c] - cells[r][(c + 1) % 8] > 2)) for r in range(8) for c in range(8))
    assert difference_hash(pixels) == int(bits, 2)


@pytest.mark.parametrize("seed", range(5))
def test_a_picture_encoded_anew_or_resized_is_near_and_another_one_is_not(tmp_path: Path, seed: int) -> None:
    original = picture(seed, 600, 800)
    original.save(tmp_path / "original.png")
    (tmp_path / "again.jpg").write_bytes(as_jpeg(original, quality=40))
    original.resize((301, 226)).save(tmp_path / "small.webp", quality=70)
    (tmp_path / "other.jpg").write_bytes(as_jpeg(picture(seed + 100, 600, 800)))
    assert are_near(tmp_path / "original.png", tmp_path / "again.jpg")
    assert are_near(tmp_path / "original.png", tmp_path / "small.webp")
    assert not are_near(tmp_path / "original.png", tmp_path / "other.jpg")


def test_a_jpeg_read_in_reduced_resolution_has_the_hash_of_the_whole(tmp_path: Path) -> None:
    (tmp_path / "large.jpg").write_bytes(as_jpeg(picture(1, 1500, 2000)))
    reduced = look_at(tmp_path / "large.jpg", decode=False, hashes=True)
    whole = look_at(tmp_path / "large.jpg", decode=True, hashes=True)
    assert (reduced.height, reduced.width) == (whole.height, whole.width) == (1500, 2000)
    assert reduced.content == whole.content
    assert (reduced.phash ^ whole.phash).bit_count() <= 2
    assert (reduced.dhash ^ whole.dhash).bit_count() <= 2


def test_headers_tell_what_the_model_will_see_otherwise(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    plain = picture(0)
    plain.save(tmp_path / "turned.jpg", exif=exif)
    plain.convert("CMYK").save(tmp_path / "print.jpg")
    plain.convert("RGBA").save(tmp_path / "glass.png")
    plain.convert("P").save(tmp_path / "palette.png")
    plain.save(tmp_path / "film.gif", save_all=True, append_images=[picture(1)])
    Image.fromarray(np.full((9, 8), 60_000, dtype=np.uint16)).save(tmp_path / "deep.png")
    Image.new("RGB", (40, 30), "white").save(tmp_path / "blank.png")
    for hashes in (False, True):
        looks = {path.stem: look_at(path, decode=False, hashes=hashes) for path in tmp_path.iterdir()}
        assert looks["turned"].orientation == 6
        assert (looks["turned"].height, looks["turned"].width) == (90, 120)
        assert looks["print"].mode == "CMYK"
        assert looks["glass"].has_alpha
        assert looks["palette"].mode == "P"
        assert looks["film"].is_animated
        assert looks["deep"].mode == "I;16"
        assert looks["blank"].is_flat == hashes
        special = {"turned", "print", "glass", "palette", "film", "deep"}
        for name in special - {"turned"}:
            assert looks[name].orientation == 1
        for name in special - {"film"}:
            assert not looks[name].is_animated
        for name in special - {"glass"}:
            assert not looks[name].has_alpha


@pytest.mark.parametrize("hashes", [False, True])
@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_a_file_cut_short_is_found(tmp_path: Path, kind: str, hashes: bool) -> None:
    path = tmp_path / f"cut.{kind}"
    picture(0, 600, 800).save(path)
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(UnusableImageError, match="damaged or cut short"):
        look_at(path, decode=False, hashes=hashes)


def test_damage_inside_is_found_by_hashing_and_by_decoding_not_by_headers(tmp_path: Path) -> None:
    path = tmp_path / "broken.png"
    picture(0).save(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    assert look_at(path, decode=False, hashes=False).height == 90
    for decode, hashes in ((True, False), (False, True)):
        with pytest.raises(UnusableImageError):
            look_at(path, decode=decode, hashes=hashes)
