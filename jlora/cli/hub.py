"""`jlora push` and `jlora pull`: adapters to and from the hub."""

from pathlib import Path
from typing import Annotated, Any

import typer

from jlora.cli import show
from jlora.cli.options import DryRun, Force, Json
from jlora.interop import formats

FILES = ("adapter_config.json", "adapter.json", "*.safetensors", "README.md")  # no pickles, no code, no tokenizers
Repo = Annotated[str, typer.Argument(metavar="REPO", help="The hub's name of the adapter, owner/name.")]


def push(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="The folder of an adapter.")],
    repo: Repo,
    private: Annotated[bool, typer.Option("--private", help="Of a repository that is made.")] = False,
    message: Annotated[str, typer.Option("--message", help="Of the commit.")] = "Upload an adapter",
    revision: Annotated[str | None, typer.Option("--revision", help="A branch.")] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Uploads an adapter's folder: its config, its tensors and its card, and nothing else that lies there.

    The token is huggingface_hub's own: `hf auth login`, or HF_TOKEN.
    """
    found = formats.recognise(adapter)
    if found.format not in formats.ADAPTERS or not found.path.is_dir():
        raise ValueError(f"'{adapter}' is no folder of an adapter: push takes one of PEFT or jlora")
    formats.open_adapter(adapter)  # a damaged one is not sent
    files = sorted({p.name for pattern in FILES for p in found.path.glob(pattern) if p.is_file()})
    size = sum((found.path / name).stat().st_size for name in files)
    url = ""
    if not dry_run:
        api = _api()
        api.create_repo(repo, private=private, exist_ok=True, repo_type="model")
        url = str(
            api.upload_folder(
                repo_id=repo, folder_path=str(found.path), allow_patterns=list(files), commit_message=message,
                revision=revision, repo_type="model",
            )
        )  # fmt: skip
    report = {"command": "push", "repo": repo, "files": files, "bytes": size, "dry_run": dry_run, "url": url}
    verb = "would upload" if dry_run else "uploaded"
    text = f"{verb} {', '.join(files)} ({show.size(size)}) to {repo}"
    show.show(report, as_json, lambda console: console.print(text, markup=False))
    if "README.md" not in files and not as_json:
        typer.echo("there is no README.md: `jlora card` writes one", err=True)


def pull(
    repo: Repo,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    revision: Annotated[str | None, typer.Option("--revision", help="A branch, tag or commit.")] = None,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Downloads an adapter: its config, its tensors and its card, and no code, no pickles, no tokenizer."""
    show.check_free(out, force)
    api = _api()
    names = sorted(name for name in api.list_repo_files(repo, revision=revision) if _wanted(name))
    if not any(name in ("adapter_config.json", "adapter.json") or name.endswith(".safetensors") for name in names):
        raise ValueError(
            f"'{repo}' holds no adapter: neither adapter_config.json nor adapter.json, and no *.safetensors"
        )
    if not dry_run:
        with show.staged(out, force) as folder:
            for name in names:
                api.hf_hub_download(repo, name, revision=revision, local_dir=str(folder))
            show.remove(folder / ".cache")
    report = {"command": "pull", "repo": repo, "out": str(out), "files": names, "dry_run": dry_run}
    verb = "would download" if dry_run else "downloaded"
    show.show(report, as_json, lambda console: console.print(f"{verb} {', '.join(names)} to {out}", markup=False))


def _wanted(name: str) -> bool:
    return "/" not in name and (name in FILES or name.endswith(".safetensors"))


def _api() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError('the hub needs huggingface_hub: pip install "jlora[models]"') from error
    return _Named(huggingface_hub.HfApi())


class _Named:
    """The hub's client, whose errors, its own and its HTTP library's, are ValueErrors of one line."""

    def __init__(self, api: Any) -> None:
        self._api = api

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            try:
                return getattr(self._api, name)(*arguments, **options)
            except OSError as error:
                if error.errno is not None:
                    raise
                raise ValueError(f"the hub said no: {type(error).__name__}: {error}") from error
            except Exception as error:
                raise ValueError(f"the hub said no: {type(error).__name__}: {error}") from error

        return call
