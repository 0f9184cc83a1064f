"""Frames out of real clips: the published choice, whatever the container says, and from video files only."""

import subprocess
import sys
from pathlib import Path

import av
import av.stream
import numpy as np
import pytest

from clips import frame_number, write_clip, write_sound
from phi3v.data.convert import video
from phi3v.data.convert.video import UnusableVideoError, frame_indices, read_frames
from phi3v.errors import ConfigError


def published_indices(total: int, num_frames: int) -> list[int]:
    return np.arange(0, total, total / num_frames).astype(int).tolist()


def numbers(path: Path, num_frames: int) -> list[int]:
    return [frame_number(image) for image in read_frames(path, num_frames)]


def state_num_frames(path: Path, count: int) -> None:
    """Overwrites the number of frames in an AVI file's stream header."""
    content = bytearray(path.read_bytes())
    place = content.index(b"strh") + 8 + 32
    content[place : place + 4] = count.to_bytes(4, "little")
    path.write_bytes(content)


@pytest.mark.parametrize("num_frames", [1, 2, 4, 8, 16])
def test_the_choice_is_the_published_one(num_frames: int) -> None:
    for total in range(1, 2000):
        assert frame_indices(total, num_frames) == published_indices(total, num_frames)


@pytest.mark.parametrize("num_frames", [3, 7, 20, 30])
def test_where_arange_rounds_the_choice_is_exact(num_frames: int) -> None:
    for total in range(1, 2000):
        chosen, published = frame_indices(total, num_frames), published_indices(total, num_frames)
        assert len(chosen) == num_frames <= len(published) <= num_frames + 1
        assert all(0 <= mine - theirs <= 1 for mine, theirs in zip(chosen, published, strict=False))


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("clip.avi", "mpeg4"),
        ("clip.avi", "mjpeg"),
        ("clip.mp4", "libx264"),
        ("clip.mov", "mpeg4"),
        ("clip.mkv", "libx264"),  # states no number of frames
        ("clip.webm", "libvpx"),
        ("clip.mpg", "mpeg1video"),
        ("clip.flv", "flv"),
        ("clip.wmv", "msmpeg4v3"),
    ],
)
@pytest.mark.parametrize("total", [29, 100])
def test_frames_are_those_of_the_published_choice(tmp_path: Path, name: str, codec: str, total: int) -> None:
    assert numbers(write_clip(tmp_path / name, total, codec), 8) == published_indices(total, 8)


def test_a_gif_is_a_clip(tmp_path: Path) -> None:
    images = read_frames(write_clip(tmp_path / "clip.mkv", 12, "mpeg4"), 12)
    images[0].save(tmp_path / "clip.gif", save_all=True, append_images=images[1:])
    assert numbers(tmp_path / "clip.gif", 4) == [0, 3, 6, 9]


@pytest.mark.parametrize("total", [1, 3, 8])
def test_a_short_clip_shows_frames_several_times(tmp_path: Path, total: int) -> None:
    assert numbers(write_clip(tmp_path / "clip.avi", total), 8) == published_indices(total, 8)


@pytest.mark.parametrize("stated", [0, 9, 500])
def test_a_wrong_number_in_the_header_is_not_believed(tmp_path: Path, stated: int) -> None:
    clip = write_clip(tmp_path / "clip.avi", 40)
    state_num_frames(clip, stated)
    with av.open(str(clip)) as container:
        assert container.streams.video[0].frames == stated
    assert numbers(clip, 8) == published_indices(40, 8)


@pytest.mark.parametrize("codec", ["mpeg4", "mjpeg"])
def test_a_clip_cut_short_gives_the_frames_that_are_there(tmp_path: Path, codec: str) -> None:
    clip = write_clip(tmp_path / "clip.avi", 100, codec)
    with av.open(str(clip)) as container:
        places = [packet.pos or 0 for packet in container.demux() if packet.size]
    clip.write_bytes(clip.read_bytes()[: places[60] + 30])  # within frame 60
    assert numbers(clip, 8) == published_indices(60, 8)


def test_frames_are_rgb_of_the_clip_s_size(tmp_path: Path) -> None:
    (image,) = read_frames(write_clip(tmp_path / "clip.avi", 2), 1)
    assert (image.mode, image.size) == ("RGB", (80, 32))


def test_a_name_that_looks_like_an_address_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_clip(tmp_path / "clip.avi", 5).rename(tmp_path / "concat:clip.avi")
    assert numbers(Path("concat:clip.avi"), 1) == [0]


def test_a_title_that_is_not_utf8_does_not_matter(tmp_path: Path) -> None:
    with av.open(str(write_clip(tmp_path / "clip.avi", 5))) as clip, av.open(str(tmp_path / "named.avi"), "w") as named:
        named.metadata["title"] = "Xylophon"
        stream = named.add_stream_from_template(clip.streams.video[0])
        for packet in clip.demux():
            if packet.size:
                packet.stream = stream
                named.mux(packet)
    content = (tmp_path / "named.avi").read_bytes()
    assert b"Xylophon" in content
    (tmp_path / "named.avi").write_bytes(content.replace(b"Xylophon", b"Xyloph\xf6n"))
    assert numbers(tmp_path / "named.avi", 1) == [0]


def write_damaged(path: Path) -> None:
    content = bytearray(write_clip(path, 60, "libx264").read_bytes())
    third = len(content) // 3
    content[third : third + 600] = bytes(range(200)) * 3
    path.write_bytes(content)


def write_cover_only(path: Path) -> None:
    """A sound file whose only picture is its cover."""
    write_sound(path.with_suffix(".aac.mp4"))
    write_clip(path.with_suffix(".jpg.avi"), 1, "mjpeg")
    with (
        av.open(str(path.with_suffix(".aac.mp4"))) as sound,
        av.open(str(path.with_suffix(".jpg.avi"))) as cover,
        av.open(str(path), "w") as container,
    ):
        streams = {}
        for source in (sound.streams[0], cover.streams[0]):
            streams[source.type] = container.add_stream_from_template(source)
        streams["video"].disposition = av.stream.Disposition.attached_pic.value
        for source in (cover, sound):
            for packet in source.demux():
                if packet.size:
                    packet.stream = streams[packet.stream.type]
                    container.mux(packet)


@pytest.mark.parametrize(
    ("name", "write", "message", "reason"),
    [
        ("gone.avi", lambda path: None, r"does not exist \(looked for .*gone.avi\)", "missing clip"),
        ("folder.avi", Path.mkdir, "is not a file", "missing clip"),
        ("empty.avi", Path.touch, "is not a video that can be read .*0 bytes", "not a video"),
        (
            "text.avi",
            lambda path: path.write_text("no picture\n" * 500),
            "is not a video .*Invalid data.*5500 bytes.*one of these kinds: .avi",
            "not a video",
        ),
        ("sound.mp4", write_sound, "has no video stream", "no video stream"),
        ("cover.mp4", write_cover_only, "has no video stream", "no video stream"),
        ("damaged.mp4", write_damaged, r"is damaged \(Invalid data", "corrupt clip"),
        ("none.avi", lambda path: write_clip(path, 0), "holds no frame", "corrupt clip"),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path: Path, name: str, write, message: str, reason: str) -> None:
    write(tmp_path / name)
    with pytest.raises(UnusableVideoError, match=message) as raised:
        read_frames(tmp_path / name, 8)
    assert raised.value.reason == reason


@pytest.mark.parametrize(
    "text",
    [
        "ffconcat version 1.0\nfile secret.avi\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile://{folder}/secret.avi\n#EXT-X-ENDLIST\n",
        "v=0\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
    ],
    ids=["concat", "hls", "sdp"],
)
def test_a_playlist_that_calls_itself_a_clip_is_refused(tmp_path: Path, text: str) -> None:
    write_clip(tmp_path / "secret.avi", 10)
    playlist = tmp_path / "list.avi"
    playlist.write_text(text.replace("{folder}", str(tmp_path)))
    with pytest.raises(UnusableVideoError, match="is not a video that can be read"):
        read_frames(playlist, 8)


def test_a_playlist_is_named_as_one(tmp_path: Path) -> None:
    write_clip(tmp_path / "secret.avi", 10)
    (tmp_path / "list.avi").write_text("ffconcat version 1.0\nfile secret.avi\n")
    with av.open(str(tmp_path / "list.avi")) as container:
        assert container.format.name == "concat"  # what FFmpeg does when nobody forbids it
    with pytest.raises(UnusableVideoError, match="a playlist, or another format that is not opened here"):
        read_frames(tmp_path / "list.avi", 8)


@pytest.mark.parametrize(("name", "codec"), [("clip.avi", "mpeg4"), ("clip.mp4", "libx264"), ("clip.avi", "mjpeg")])
def test_the_pixel_limit_of_images_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, codec: str
) -> None:
    clip = write_clip(tmp_path / name, 3, codec, block_px=96)
    monkeypatch.setattr(video, "MAX_IMAGE_PIXELS", 192 * 480)
    assert len(read_frames(clip, 1)) == 1
    monkeypatch.setattr(video, "MAX_IMAGE_PIXELS", 192 * 480 - 1)
    with pytest.raises(UnusableVideoError, match=r"is too large: 192x480 px .*limit of 92159 pixels") as raised:
        read_frames(clip, 1)
    assert raised.value.reason == "decompression bomb"


def test_frames_that_grow_on_the_way_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = tmp_path / "clip.mpg"  # a file of this kind may be two, one behind the other
    write_clip(clip, 40, "mpeg1video", block_px=96)
    with (tmp_path / "clip.mpg").open("ab") as file:
        file.write(write_clip(tmp_path / "large.mpg", 40, "mpeg1video", block_px=192).read_bytes())
    assert read_frames(clip, 8)[-1].size == (960, 384)
    monkeypatch.setattr(video, "MAX_IMAGE_PIXELS", 192 * 480)
    with pytest.raises(UnusableVideoError, match="is damaged"):
        read_frames(clip, 8)


def test_without_pyav_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = write_clip(tmp_path / "clip.avi", 3)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ConfigError, match=r"PyAV.*pip install 'phi3v\[video\]'"):
        read_frames(clip, 1)


def test_importing_the_converters_imports_neither_av_nor_torch() -> None:
    code = (
        "import sys; sys.argv[0] = 'phi3v'; import phi3v.data.convert.ucf101, phi3v.data.convert.video_folders;"
        "assert not {'av', 'torch', 'huggingface_hub'} & set(sys.modules), set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
