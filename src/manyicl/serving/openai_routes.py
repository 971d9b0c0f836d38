"""OpenAI's addresses for files, fine-tuning jobs and models, so that every client of theirs works. No answers are made here."""

import re
import secrets
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response
from starlette.datastructures import FormData, UploadFile

from manyicl.serving.database import FileRow, JobEventRow, JobRow
from manyicl.serving.errors import ApiError
from manyicl.serving.schemas import (
    Deleted,
    File,
    FileList,
    Job,
    JobError,
    JobEvent,
    JobEventList,
    JobList,
    Model,
    ModelList,
    NewJob,
)
from manyicl.serving.service import OwnedNow, ServiceNow, find_served, in_thread
from manyicl.serving.settings import BASE_MODEL
from manyicl.serving.store import JobRequest, Page
from manyicl.serving.threads import run_whole

router = APIRouter(prefix="/v1", tags=["openai"])

_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
_MAX_FILENAME = 200
_UPLOAD_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "additionalProperties": False,
                    "properties": {
                        "file": {"type": "string", "format": "binary", "minLength": 1},
                        "purpose": {"type": "string", "enum": ["fine-tune"]},
                    },
                }
            }
        },
    }
}

After = Annotated[str | None, Query(min_length=1, max_length=64, description="Id of the last entry of the page before.")]
Limit = Annotated[int, Query(ge=1, le=100)]


def show_file(row: FileRow) -> File:
    """A file as clients see it."""
    return File(id=row.id, bytes=row.num_bytes, created_at=row.created_at, filename=row.name)


def show_job(row: JobRow) -> Job:
    """A job as clients see it."""
    return Job(
        id=row.id,
        created_at=row.created_at,
        finished_at=row.finished_at,
        model=BASE_MODEL,
        fine_tuned_model=row.model_name if row.status == "succeeded" else None,
        organization_id=row.tenant,
        status=row.status,
        training_file=row.file_id,
        trained_tokens=row.trained_tokens,
        seed=row.seed,
        error=None if row.error is None else JobError(**row.error),
        metadata=row.user_metadata,
    )


def show_event(row: JobEventRow) -> JobEvent:
    """An event as clients see it."""
    return JobEvent(id=row.id, created_at=row.created_at, level=row.level, message=row.message)


@router.post("/files", openapi_extra=_UPLOAD_FORM)
async def upload_file(request: Request, owned: OwnedNow, service: ServiceNow) -> File:
    """Keep a training file. It is read when a job uses it."""
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise ApiError(
            415, "Send the file as multipart/form-data, with the fields file and purpose.", code="unsupported_media_type"
        )
    async with request.form(max_files=1, max_fields=8) as form:
        name, upload = _read_form(form)
        async with service.uploads:
            row = await run_whole(owned.add_file, name, await upload.read())
    return show_file(row)


def _read_form(form: FormData) -> tuple[str, UploadFile]:
    """The name and the file of an upload's form."""
    for field in form:
        if field not in ("file", "purpose"):
            raise ApiError(400, "The form has a field beside file and purpose.", code="unknown_parameter", param="form")
    upload, purpose = form.get("file"), form.get("purpose")
    if not isinstance(upload, UploadFile):
        raise ApiError(400, "Missing required parameter: 'file'.", code="missing_required_parameter", param="file")
    if purpose != "fine-tune":
        raise ApiError(400, "Invalid value for 'purpose': the one purpose is fine-tune.", code="invalid_value", param="purpose")
    if upload.size == 0:
        raise ApiError(400, "The file is empty.", code="invalid_file", param="file")
    name = _UNPRINTABLE.sub("", (upload.filename or "").replace("\\", "/").rpartition("/")[2])[-_MAX_FILENAME:]
    return name or "training.jsonl", upload


@router.get("/files")
async def list_files(
    owned: OwnedNow,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
    purpose: Annotated[str | None, Query(max_length=64)] = None,
) -> FileList:
    """Uploaded files."""
    if purpose not in (None, "fine-tune"):
        return FileList(data=[], first_id=None, last_id=None, has_more=False)
    rows, has_more = await in_thread(owned.files, Page(after, limit, order == "asc"))
    first, last = (rows[0].id, rows[-1].id) if rows else (None, None)
    return FileList(data=[show_file(row) for row in rows], first_id=first, last_id=last, has_more=has_more)


@router.get("/files/{file_id}")
async def get_file(file_id: str, owned: OwnedNow) -> File:
    """One file."""
    return show_file(await in_thread(owned.file, file_id))


@router.get(
    "/files/{file_id}/content",
    response_class=Response,
    responses={200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}},
)
async def get_file_content(file_id: str, owned: OwnedNow) -> Response:
    """The bytes of a file."""
    content = await in_thread(owned.file_content, file_id)
    return Response(content, media_type="application/octet-stream", headers={"X-Content-Type-Options": "nosniff"})


@router.delete("/files/{file_id}")
async def delete_file(file_id: str, owned: OwnedNow) -> Deleted:
    """Delete a file. Models made of it stay."""
    await in_thread(owned.delete_file, file_id)
    return Deleted(id=file_id, object="file")


@router.post("/fine_tuning/jobs")
async def create_job(body: NewJob, owned: OwnedNow, service: ServiceNow) -> Job:
    """Make a model of a file of examples."""
    name = f"task-{secrets.token_hex(6)}" if body.suffix is None else body.suffix
    if name == BASE_MODEL:
        raise ApiError(
            409, f"'{BASE_MODEL}' is the model without examples. Choose another suffix.", code="model_exists", param="suffix"
        )
    labels = None if body.labels is None else tuple(dict.fromkeys(label.strip() for label in body.labels))
    if labels and ("" in labels or len(labels) == 1):
        raise ApiError(
            400, "Invalid value for 'labels': give two labels or more, none of them empty.", code="invalid_value", param="labels"
        )
    texts = [*(labels or ()), *(body.metadata or {}), *(body.metadata or {}).values()]
    if any("\x00" in text for text in texts):
        raise ApiError(400, "Labels and metadata may not hold NUL characters.", code="invalid_value", param="labels")
    request = JobRequest(body.training_file, name, body.seed or 0, labels, dict(body.metadata or {}))
    row = await in_thread(owned.add_job, request)
    service.runner.wake()
    return show_job(row)


@router.get("/fine_tuning/jobs")
async def list_jobs(owned: OwnedNow, after: After = None, limit: Limit = 20) -> JobList:
    """Jobs, newest first."""
    rows, has_more = await in_thread(owned.jobs, Page(after, limit))
    return JobList(data=[show_job(row) for row in rows], has_more=has_more)


@router.get("/fine_tuning/jobs/{job_id}")
async def get_job(job_id: str, owned: OwnedNow) -> Job:
    """One job."""
    return show_job(await in_thread(owned.job, job_id))


@router.post("/fine_tuning/jobs/{job_id}/cancel")
async def cancel_job(job_id: str, owned: OwnedNow, service: ServiceNow) -> Job:
    """Stop a job that is not finished."""
    row = await in_thread(owned.cancel_job, job_id)
    service.runner.cancel(row.id)
    return show_job(row)


@router.get("/fine_tuning/jobs/{job_id}/events")
async def list_job_events(job_id: str, owned: OwnedNow, after: After = None, limit: Limit = 20) -> JobEventList:
    """What happened to a job, newest first."""
    rows, has_more = await in_thread(owned.job_events, job_id, Page(after, limit))
    return JobEventList(data=[show_event(row) for row in rows], has_more=has_more)


@router.get("/models")
async def list_models(owned: OwnedNow, service: ServiceNow) -> ModelList:
    """The models that can be called: `base` and every finished task."""
    rows = await in_thread(owned.tasks)
    tasks = [Model(id=row.name or "", created=row.created_at, owned_by=row.tenant) for row in rows]
    return ModelList(data=[Model(id=BASE_MODEL, created=service.started_at, owned_by="manyicl"), *tasks])


@router.get("/models/{model}")
async def get_model(model: str, owned: OwnedNow, service: ServiceNow) -> Model:
    """One model."""
    served = await find_served(service, owned, model)
    if served.row is None:
        return Model(id=BASE_MODEL, created=service.started_at, owned_by="manyicl")
    return Model(id=model, created=served.row.created_at, owned_by=served.row.tenant)


@router.delete("/models/{model}")
async def delete_model(model: str, owned: OwnedNow, service: ServiceNow) -> Deleted:
    """Delete a task with its examples and all that was computed of them."""
    if model == BASE_MODEL:
        raise ApiError(403, f"'{BASE_MODEL}' is the model without examples, which stays.", code="base_model", param="model")
    key = (await in_thread(owned.task, model)).key
    async with service.changes[key]:  # Examples that are being appended would be kept again.
        await in_thread(owned.delete_task, model)
    service.changes.pop(key, None)
    service.runner.wake()
    return Deleted(id=model, object="model")
