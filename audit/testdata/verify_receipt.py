"""Verifies a receipt as doc/log.md describes it, with Python's standard library alone.

    verify_receipt.py FILE KEY

The Ed25519 signature is checked where the package cryptography is installed.
"""
import base64, gzip, hashlib, json, sys


def sha256(data):
    return hashlib.sha256(data).digest()


def largest_power_of_two_below(n):
    return 1 << ((n - 1).bit_length() - 1)


def main(name, key):
    raw = open(name, "rb").read()
    head, rest = raw.split(b"\n\n", 1)
    lines = head.decode("ascii").split("\n")
    assert len(lines) == 6 and lines[0] == "cal-receipt/v1", "header"
    word, session = lines[1].split(" ")
    assert word == "session"
    word, count, _, first, _, last = lines[2].split(" ")
    assert word == "entries"
    word, note_bytes = lines[3].split(" ")
    assert word == "checkpoint"
    word, form, body_bytes = lines[4].split(" ")
    assert word == "body" and form in ("gzip", "text")
    assert lines[5] == "sha256 " + hashlib.sha256(rest).hexdigest(), "digest"
    assert len(rest) == int(note_bytes) + int(body_bytes), "lengths"
    note, body = rest[: int(note_bytes)], rest[int(note_bytes):]
    if form == "gzip":
        body = gzip.decompress(body)

    hashes, entries = [], []
    assert body.endswith(b"\n")
    for line in body[:-1].split(b"\n"):
        kind, line = line[:2], line[2:]
        if kind == b"h ":
            assert not entries
            hashes.append(base64.b64decode(line, validate=True))
        elif kind == b"e ":
            entries.append(line)
        elif kind == b"o ":
            mark, end = b'"outcome":{"payload_b64":', b',"sig_b64":"'
            before, after = line.split(mark, 1)
            at = after.rindex(end)
            entries.append(before + mark + b'"' + base64.b64encode(after[:at]) + b'"' + after[at:])
        else:
            raise AssertionError("line of the body")
    parsed = [json.loads(entry) for entry in entries]
    index = [entry["seq"] for entry in parsed]
    assert all(a < b for a, b in zip(index, index[1:])), "order"
    assert all(entry["session"] == session for entry in parsed), "session"
    links = [entry.get("prev") for entry in parsed]
    assert links[0] is None, "an entry before the first"
    assert all(link in (None, before) for link, before in zip(links[1:], index)), "an entry that was left out"
    whole = parsed[0]["kind"] == "pod.create" and None not in links[1:]
    assert (len(index), index[0], index[-1]) == (int(count), int(first), int(last)), "entries"

    text, signatures = note.split(b"\n\n", 1)
    origin, size, root = text.decode().split("\n")[:3]
    size = int(size)
    leaves = dict(zip(index, entries))
    assert index[-1] < size

    def subtree(lo, hi):
        if not any(lo <= i < hi for i in index):
            return hashes.pop(0)
        if hi - lo == 1:
            return sha256(b"\x00" + leaves[lo])
        middle = lo + largest_power_of_two_below(hi - lo)
        left = subtree(lo, middle)
        return sha256(b"\x01" + left + subtree(middle, hi))

    assert base64.b64encode(subtree(0, size)).decode() == root, "root"
    assert not hashes, "hashes"

    name, key_id, key = key.split("+", 2)
    key = base64.b64decode(key)
    assert name == origin and key[0] == 1, "key"
    assert sha256(name.encode() + b"\n" + key)[:4].hex() == key_id, "key id"
    mine = [line.split(" ")[2] for line in signatures.decode().splitlines() if line.startswith("\u2014 " + name + " ")]
    mine = [s for s in map(base64.b64decode, mine) if s[:4].hex() == key_id]
    assert mine, "not signed by this key"
    checked = "signature not checked"
    try:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    except ImportError:
        pass
    else:
        Ed25519PublicKey.from_public_bytes(key[1:]).verify(mine[0][4:], text + b"\n")
        checked = "signature checked"
    between = index[-1] - index[0] + 1 - len(index)
    print(f"{len(index)} entries from {index[0]} to {index[-1]} of {origin}, {between} between; {checked}; " + ("all of the session to there" if whole else "maybe not all"))


main(*sys.argv[1:])
