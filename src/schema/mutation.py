"""What can be changed: the root fields, from each subject."""

import strawberry

from .access_changes import AccessMutation
from .bulk import BulkMutation
from .exports import ExportMutation
from .job_changes import JobMutation
from .model_changes import ModelMutation
from .upload_changes import UploadMutation
from .version_changes import VersionMutation


@strawberry.type(
    description="What can be changed. Each takes one `input`, and answers what is to be mended as data."
)
class Mutation(
    ModelMutation,
    VersionMutation,
    AccessMutation,
    UploadMutation,
    JobMutation,
    BulkMutation,
    ExportMutation,
):
    pass
