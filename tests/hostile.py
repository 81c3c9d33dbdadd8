"""A folder of images as people have them and as attackers make them; what each may become is said with it."""

import io
import os
import struct
import zipfile
import zlib
from pathlib import Path

import cv2
import numpy as np
from pictures import photo, saved, ycck
from PIL import Image, ImageCms

CLASSES = ("cats", "dogs")
IMAGE = "image"
CUT = {"truncated", "corrupt"}
BAD = {IMAGE, "truncated", "corrupt", "not_an_image", "too_large", "unsupported"}  # a flipped bit may do anything
ENCODINGS = {
    "baseline.jpg": ("JPEG", {}),
    "progressive.jpg": ("JPEG", {"progressive": True}),
    "plain.png": ("PNG", {}),
    "still.gif": ("GIF", {}),
    "lossy.webp": ("WEBP", {}),
    "lossless.webp": ("WEBP", {"lossless": True}),
    "plain.tif": ("TIFF", {}),
    "packed.tiff": ("TIFF", {"compression": "tiff_lzw"}),
    "plain.bmp": ("BMP", {}),
}


def write_good(folder: Path, count: int = 40) -> set[str]:
    """`count` good photos in class folders; returns their paths below `folder`."""
    names = {f"{CLASSES[i % 2]}/good {i:03d}.{'png' if i % 3 == 0 else 'jpg'}" for i in range(count)}
    for name in names:
        image = photo(80 + len(name), 70, seed=int(name[10:13]))
        _write(folder, name, saved(image, "PNG" if name.endswith("png") else "JPEG"))
    return names


def write_hostile(folder: Path) -> dict[str, set[str]]:
    """More than 300 files and other things in class folders; {path below `folder`: what may become of it}: IMAGE,
    reasons of rejects, or nothing at all (not listed). Names that are no UTF-8 are given with surrogates."""
    files = {**_odd_kinds(), **_cut(), **_flipped(), **_bombs(), **_not_images()}
    expected = {}
    for i, (name, (raw, outcome)) in enumerate(files.items()):
        path = f"{CLASSES[i % 2]}/{name}"
        _write(folder, path, raw)
        expected[path] = outcome
    return expected | _odd_names(folder) | _odd_things(folder)


def _write(folder: Path, name: str, raw: bytes) -> None:
    path = os.path.join(folder, name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(raw)


def _odd_kinds() -> dict:
    picture, sixteen = photo(), np.asarray(photo()).astype(np.uint16) * 257
    clear, frames = photo().convert("RGBA"), {"save_all": True, "append_images": [photo(seed=1), photo(seed=2)]}
    clear.putalpha(photo(seed=3).convert("L"))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    files = {
        "cmyk.jpg": saved(picture.convert("CMYK"), "JPEG", quality=95),
        "ycck.jpg": ycck(picture),
        "grey.jpg": saved(picture.convert("L"), "JPEG"),
        "srgb.jpg": saved(picture, "JPEG", icc_profile=srgb),
        "comment.jpg": saved(picture, "JPEG", comment=b"here"),
        "png named.JPEG": saved(picture, "PNG"),
        "gif named.png": saved(picture, "GIF"),
        "jpeg named.bmp": saved(picture, "JPEG"),
        "16 grey.png": saved(Image.fromarray(sixteen[..., 0]), "PNG"),
        "16 grey.tif": saved(Image.fromarray(sixteen[..., 0]), "TIFF"),
        "16 colour.png": cv2.imencode(".png", sixteen[..., ::-1])[1].tobytes(),
        "16 colour.tif": cv2.imencode(".tiff", sixteen[..., ::-1])[1].tobytes(),
        "palette.png": saved(picture.convert("P"), "PNG"),
        "bilevel.png": saved(picture.convert("1"), "PNG"),
        "bilevel.tif": saved(picture.convert("1"), "TIFF", compression="group4"),
        "cmyk.tif": saved(picture.convert("CMYK"), "TIFF"),
        "alpha.png": saved(clear, "PNG"),
        "alpha.webp": saved(clear, "WEBP", lossless=True),
        "grey alpha.png": saved(clear.convert("LA"), "PNG"),
        "clear colour.png": saved(picture.convert("P"), "PNG", transparency=3),
        "clear colour.gif": saved(picture.convert("P"), "GIF", transparency=3),
        "portable.ppm": saved(picture, "PPM"),
        "one pixel.png": saved(picture.resize((1, 1)), "PNG"),
        "a line.jpg": saved(picture.resize((2000, 1)), "JPEG"),
    }
    for form, extension in (("GIF", "gif"), ("WEBP", "webp"), ("PNG", "png"), ("TIFF", "tif")):
        files[f"several.{extension}"] = saved(picture, form, **frames)
    for orientation in range(10):  # 0 and 9 mean nothing
        exif = Image.Exif()
        exif[0x0112] = orientation
        for form in ("JPEG", "PNG", "WEBP"):
            files[f"turned {orientation} {form}.jpg"] = saved(picture, form, exif=exif, lossless=True)
    return {name: (raw, {IMAGE}) for name, raw in files.items()}


def _cut() -> dict:
    files = {}
    for name, (form, options) in ENCODINGS.items():
        raw = saved(photo(), form, **options)
        files |= {f"cut {tenth} {name}": (raw[: len(raw) * tenth // 10], CUT) for tenth in range(1, 10)}
        files[f"cut late {name}"] = raw[:-1], {IMAGE, *CUT}  # what is lost may be a byte of padding
    jpeg = saved(photo(), "JPEG")
    files["zeroed half.jpg"] = jpeg[: len(jpeg) // 2] + bytes(len(jpeg) // 2), CUT
    files["joined halves.jpg"] = jpeg[: len(jpeg) // 2] + jpeg, {IMAGE, "corrupt", "truncated"}
    files["trailing.jpg"] = jpeg + b"and then some", {IMAGE}
    files["trailing.png"] = saved(photo(), "PNG") + bytes(1000), {IMAGE}
    return files


def _flipped() -> dict:
    files, random = {}, np.random.default_rng(11)
    for name, (form, options) in ENCODINGS.items():
        raw = saved(photo(), form, **options)
        for i in range(20):
            bad = bytearray(raw)
            for at in random.integers(0, len(raw) if i % 2 else min(len(raw), 200), 1 + i // 5):
                bad[at] ^= 1 << random.integers(8)
            files[f"flipped {i} {name}"] = bytes(bad), BAD
    return files


def claims(form: str, side: int) -> bytes:
    """A small greyscale file whose header claims side x side pixels."""
    raw = bytearray(saved(Image.new("L", (8, 8)), form))
    if form == "BMP":
        raw[18:26] = side.to_bytes(4, "little") * 2
    elif form == "PNG":
        raw[16:24] = side.to_bytes(4, "big") * 2
        raw[29:33] = zlib.crc32(raw[12:29]).to_bytes(4, "big")
    elif form == "GIF":
        raw[6:10] = side.to_bytes(2, "little") * 2
    elif form == "WEBP":
        header = b"VP8X" + (10).to_bytes(4, "little") + bytes(4) + (side - 1).to_bytes(3, "little") * 2
        raw = b"RIFF" + (len(raw) + 10).to_bytes(4, "little") + b"WEBP" + header + raw[12:]
    elif form == "TIFF":
        for tag in (256, 257):  # width and height, of type LONG
            at = raw.index(struct.pack("<HHI", tag, 4, 1))
            raw[at + 8 : at + 12] = side.to_bytes(4, "little")
    else:
        at = raw.index(b"\xff\xc0")
        raw[at + 5 : at + 9] = side.to_bytes(2, "big") * 2
    return bytes(raw)


def chunk(name: bytes, payload: bytes) -> bytes:
    """A PNG's chunk."""
    return len(payload).to_bytes(4, "big") + name + payload + zlib.crc32(name + payload).to_bytes(4, "big")


def _bombs() -> dict:
    files = {f"bomb {form}.jpg": claims(form, 60_000) for form in ("JPEG", "PNG", "GIF", "BMP", "TIFF")}
    files["bomb WEBP.webp"] = claims("WEBP", 16_383)
    png, packed = saved(photo(), "PNG"), zlib.compress(bytes(100_000_000), 9)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0))
    files["packed.png"] = png[:8] + header + chunk(b"IDAT", packed) + chunk(b"IEND", b"")
    files["packed text.png"] = png[:33] + chunk(b"zTXt", b"a\0\0" + packed) + png[33:]
    files["packed profile.png"] = png[:33] + chunk(b"iCCP", b"a\0\0" + packed) + png[33:]
    files["many chunks.png"] = png[:33] + chunk(b"prVt", b"") * 100_001 + png[33:]
    jpeg, scans = saved(photo(), "JPEG"), saved(photo(2000, 2000), "JPEG", progressive=True)
    at = scans.rindex(b"\xff\xda")
    files["many segments.jpg"] = jpeg[:2] + b"\xff\xfe\0\2" * 100_001 + jpeg[2:]
    files["many scans.jpg"] = scans[:at] + b"\xff\xda\0\x08\1\1\0\x3f\0\0" * 1000 + scans[at:]
    bombs = {name: (raw, {"too_large"}) for name, raw in files.items()}
    # The header tells of no more than was asked for: what else there is, is never unpacked.
    small = png[:8] + chunk(b"IHDR", struct.pack(">IIBBBBB", 50, 50, 8, 0, 0, 0, 0)) + chunk(b"IDAT", packed)
    return bombs | {"more than it says.png": (small + chunk(b"IEND", b""), {IMAGE, "corrupt"})}


def _not_images() -> dict:
    box = io.BytesIO()
    with zipfile.ZipFile(box, "w") as archive:
        archive.writestr("a.jpg", saved(photo(), "JPEG"))
    files = {
        "zip.jpg": box.getvalue(),
        "page.jpg": b"<!DOCTYPE html><html><body>404 Not Found</body></html>" * 20,
        "paper.jpg": b"%PDF-1.7\n" + bytes(range(256)) * 4,
        "program.jpg": b"MZ\x90\0" + bytes(500),
        "elf.png": b"\x7fELF" + bytes(500),
        "text.png": b"hello\n",
        "zeros.jpg": bytes(5000),
        "noise.bmp": np.random.default_rng(5).bytes(5000),
        "one byte.jpg": b"\xff",
        "two bytes.jpg": b"\xff\xd8",
        "._resource fork.jpg": b"\0\5\x16\7" + bytes(100),
    }
    strange = {name: (raw, {"not_an_image"}) for name, raw in files.items()}
    strange["._resource fork.jpg"] = files["._resource fork.jpg"], set()  # hidden files are passed over
    others = {"photoshop.jpg": b"8BPS\0\1", "drawing.jpg": b"<svg xmlns=", "phone.jpg": b"\0\0\0\x18ftypheic"}
    strange |= {name: (raw + bytes(300), {"unsupported"}) for name, raw in others.items()}
    lab = Image.merge("LAB", photo().split())
    floats = Image.fromarray(np.random.default_rng(0).random((9, 9)).astype(np.float32))
    strange |= {name: (saved(i, "TIFF"), {"unsupported"}) for name, i in (("lab.tif", lab), ("float.tif", floats))}
    heads = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"II*\0", b"RIFF\0\1\0\0WEBPVP8 ", b"P6\n")
    strange |= {f"only a head {i}.png": (head, CUT) for i, head in enumerate(heads)}
    strange |= {f"head and noise {i}.jpg": (h + files["noise.bmp"], CUT | {"unsupported"}) for i, h in enumerate(heads)}
    return strange | {"empty.jpg": (b"", {"empty"}), "empty.tiff": (b"", {"empty"})}


def _odd_names(folder: Path) -> dict[str, set[str]]:
    names = ["line\nbreak.jpg", "tab\tand\rreturn.jpg", "a.b.c..jpg", "dots...png.jpg", "snow ☃ 🐈.jpg", "ﺕﺀ.jpg"]
    names += ["é.jpg", "e\u0301.jpg", " .jpg", "'\"`$(x);|&.jpg", "%2e%2e%2f.jpg", "\\back\\slash.jpg", "UPPER.JPG"]
    names += ["-rf.jpg", "*?[a].jpg", "n" * 251 + ".jpg", "🐈" * 62 + "abc.jpg", "\udcff\udcfe.jpg", "\x01\x7f.jpg"]
    names += ["/".join(["deep"] * 40) + "/down.jpg", "folder.jpg/inside.jpg", "Mixed.JpEg", "\\xff.jpg"]
    raw, expected = saved(photo(seed=9), "JPEG"), {}
    for name in names:
        _write(folder, f"{CLASSES[0]}/{name}", raw)
        expected[f"{CLASSES[0]}/{name}"] = {IMAGE}
    return expected


def _odd_things(folder: Path) -> dict[str, set[str]]:
    at, raw = folder / CLASSES[1], saved(photo(seed=10), "JPEG")
    (at / "target").mkdir()
    (at / "target" / "real.jpg").write_bytes(raw)
    (at / "locked.jpg").write_bytes(raw)
    (at / "locked.jpg").chmod(0)
    (at / "a folder.jpg").mkdir()
    os.mkfifo(at / "pipe.jpg")
    links = {"good link.jpg": "target/real.jpg", "dangling.jpg": "nowhere.jpg", "itself.jpg": "itself.jpg"}
    links |= {"there.jpg": "back.jpg", "back.jpg": "there.jpg", "to folder.jpg": "target", "up": "..", "round": "."}
    links |= {"outside.jpg": "/dev/null", "inside.jpg": "locked.jpg/no.jpg"}
    for name, target in links.items():
        (at / name).symlink_to(target)
    locked = {IMAGE} if os.geteuid() == 0 else {"unreadable"}  # root reads everything
    outcomes = {"target/real.jpg": {IMAGE}, "good link.jpg": {IMAGE}, "to folder.jpg/real.jpg": {IMAGE}}
    outcomes |= {name: {"unreadable"} for name in ("dangling.jpg", "itself.jpg", "there.jpg", "back.jpg", "inside.jpg")}
    outcomes |= {"locked.jpg": locked} | {name: set() for name in ("a folder.jpg", "pipe.jpg", "outside.jpg")}
    return {f"{CLASSES[1]}/{name}": outcome for name, outcome in outcomes.items()}
