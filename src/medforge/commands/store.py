"""`medforge store serve|ls|get|put`: the object store of the environment, or the embedded one."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    """Declare `store`."""
    group = commands.add_parser("store", help="serve, list, fill and read the object store").add_subparsers(
        dest="action", required=True, metavar="ACTION"
    )
    serve = group.add_parser("serve", help="serve the embedded store until Ctrl-C, for other programs")
    serve.set_defaults(run=_serve)
    ls = group.add_parser("ls", help="list the buckets, or the objects below a prefix")
    ls.add_argument("url", nargs="?", metavar="s3://BUCKET/PREFIX")
    ls.set_defaults(run=_ls)
    get = group.add_parser("get", help="download an object or a folder, checked by its manifest's SHA-256")
    get.add_argument("url", metavar="s3://BUCKET/PREFIX")
    get.add_argument("target", type=Path, metavar="TARGET")
    get.set_defaults(run=_get)
    put = group.add_parser("put", help="upload a file or a folder with its manifest of SHA-256")
    put.add_argument("source", type=Path, metavar="SOURCE")
    put.add_argument("url", metavar="s3://BUCKET/PREFIX")
    put.set_defaults(run=_put)
    for command in (serve, ls, get, put):
        add_root(command)


def add_root(command: argparse.ArgumentParser) -> None:
    """The option of every command that may use the embedded store."""
    command.add_argument(
        "--root",
        type=Path,
        default=Path(".medforge"),
        metavar="FOLDER",
        help="folder of the embedded store, used where MEDFORGE_S3_ENDPOINT is not set (%(default)s)",
    )


def _serve(arguments: argparse.Namespace) -> None:
    import threading
    from contextlib import suppress

    from medforge.embedded import serve
    from medforge.storage import is_configured

    if is_configured():
        raise ValueError("MEDFORGE_S3_ENDPOINT is set, so the embedded store would not be used; unset it first")
    with serve(arguments.root) as environment:
        keys = arguments.root / "store-keys.json"
        print(f"The store {arguments.root / 'store'} answers at http://{environment['MEDFORGE_S3_ENDPOINT']}")
        print("Ctrl-C stops it. In another shell:")
        print(f"  export MEDFORGE_S3_ENDPOINT={environment['MEDFORGE_S3_ENDPOINT']}")
        for name, field in (("MEDFORGE_S3_ACCESS_KEY", "access_key"), ("MEDFORGE_S3_SECRET_KEY", "secret_key")):
            # The keys stay in their file: what is printed ends up in logs.
            read = f"import json; print(json.load(open('{keys.resolve()}'))['{field}'])"
            print(f'  export {name}="$(python3 -c "{read}")"', flush=True)
        with suppress(KeyboardInterrupt):  # the way in which it is meant to end
            threading.Event().wait()
    print("The store is stopped.")


def _ls(arguments: argparse.Namespace) -> None:
    from medforge.storage import connect, parse_url

    bucket, prefix = parse_url(arguments.url) if arguments.url else ("", "")
    with connect(arguments.root, create=False) as store:
        if not bucket:
            for name in store.buckets():
                print(f"s3://{name}")
            return
        entries = store.list(bucket, prefix)
        if not entries and prefix and store.exists(bucket, prefix):
            entries = [entry for entry in store.list(bucket, prefix.rpartition("/")[0]) if entry.key == prefix]
        if not entries and prefix:
            raise ValueError(f"{arguments.url}: there is nothing here; `medforge store ls s3://{bucket}` lists all")
        for entry in entries:
            print(f"{entry.size:>14,}  s3://{bucket}/{entry.key}")
        print(f"{sum(entry.size for entry in entries):>14,}  bytes in {len(entries)} objects")


def _get(arguments: argparse.Namespace) -> None:
    from medforge.release.publish import copy_release
    from medforge.storage import connect, parse_url

    bucket, prefix = parse_url(arguments.url)
    target: Path = arguments.target
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise ValueError(f"{target}: is there already and is not overwritten; give a new name")
    with connect(arguments.root, create=False) as store:
        if prefix and store.exists(bucket, prefix):
            target = target / prefix.rpartition("/")[2] if target.is_dir() else target
            store.download_file(bucket, prefix, target)
            print(f"{target}: one object, {target.stat().st_size:,} bytes")
        else:
            release = re.fullmatch(r"releases/([0-9a-f]{64})/?", prefix)
            if release:  # its manifest has the SHA-256 of its files, and its name is the manifest's
                files = copy_release(store, bucket, release[1], target)
            else:
                files = store.download_folder(bucket, prefix, target)
            checked = "" if any(i["sha256"] for i in files.values()) else "; no manifest was there to check them by"
            print(f"{target}: {len(files)} files, {sum(i['size'] for i in files.values()):,} bytes{checked}")


def _put(arguments: argparse.Namespace) -> None:
    from medforge.storage import connect, parse_url

    bucket, prefix = parse_url(arguments.url)
    source: Path = arguments.source
    if not source.exists():
        raise ValueError(f"{source}: no such file or folder")
    if source.is_file() and (arguments.url.endswith("/") or not prefix):
        prefix = f"{prefix}/{source.name}".lstrip("/")
    with connect(arguments.root) as store:
        store.ensure_bucket(bucket)
        if source.is_file():
            store.upload_file(source, bucket, prefix)
            print(f"s3://{bucket}/{prefix}: one object, {source.stat().st_size:,} bytes")
        else:
            files = store.upload_folder(source, bucket, prefix)
            print(f"s3://{bucket}/{prefix}: {len(files)} files, {sum(i['size'] for i in files.values()):,} bytes")
