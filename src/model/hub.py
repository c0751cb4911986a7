# Downloads one model from the Hugging Face hub. The last line of stdout is a JSON object:
# {"path": ...}, or {"error": kind, "message": ...} with exit code 3.
import errno
import json
import sys


def report(**what):
    print(json.dumps(what), flush=True)
    sys.exit(3 if "error" in what else 0)


try:
    import huggingface_hub
    from huggingface_hub import errors
except ImportError as error:
    report(error="no_hub", message=str(error))

model = sys.argv[1]
ignore = ["*.pt", "*.pth", "*.gguf", "*.onnx", "*.h5", "*.msgpack", "*.ot", "original/*", "consolidated*"]
try:
    try:
        files = huggingface_hub.list_repo_files(model)
        if any(name.endswith(".safetensors") for name in files):
            ignore.append("*.bin")
    except (errors.RepositoryNotFoundError, errors.GatedRepoError):
        raise
    except Exception:
        pass  # No network: what the cache holds will do.
    report(path=huggingface_hub.snapshot_download(model, ignore_patterns=ignore))
except errors.GatedRepoError as error:
    report(error="gated", message=str(error))
except errors.RepositoryNotFoundError as error:
    report(error="not_found", message=str(error))
except errors.LocalEntryNotFoundError as error:
    report(error="no_network", message=str(error))
except Exception as error:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        report(error="bad_token", message=str(error))
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        report(error="disk_full", message=str(error))
    if type(error).__module__.split(".")[0] in ("requests", "httpx", "urllib3"):
        report(error="no_network", message=str(error))
    report(error="other", message=f"{type(error).__name__}: {error}")
