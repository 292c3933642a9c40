"""The operations that the client itself sends."""

from typing import Final

VIEWER: Final = "query Viewer { viewer { id login } }"

_VERSION: Final = "id number status label digest sizeBytes fileCount model { id fullName }"
_UPLOAD: Final = (
    "id path sizeBytes receivedBytes state protocol url headers sha256 error { message }"
)

RESOLVE: Final = f"query Resolve($ref: String!) {{ resolve(ref: $ref) {{ {_VERSION} }} }}"

VERSION: Final = f"""query Version($id: ID!) {{
  node(id: $id) {{ ... on ModelVersion {{ {_VERSION} }} }}
}}"""

FILES: Final = """query Files($id: ID!, $after: Cursor) {
  node(id: $id) { ... on ModelVersion {
    files(first: 100, after: $after) {
      nodes { id path sizeBytes sha256 }
      pageInfo { endCursor hasNextPage }
    }
  } }
}"""

FILES_WITH_LINKS: Final = """query FilesWithLinks($id: ID!, $after: Cursor) {
  node(id: $id) { ... on ModelVersion {
    files(first: 100, after: $after) {
      nodes { id path sizeBytes sha256 downloadUrl }
      pageInfo { endCursor hasNextPage }
    }
  } }
}"""

LINK: Final = "query Link($id: ID!) { node(id: $id) { ... on ModelFile { downloadUrl } } }"

MODEL: Final = """query Model($owner: String!, $name: String!) {
  model(owner: $owner, name: $name) { id fullName visibility }
}"""

PERMISSIONS: Final = """query Permissions($owner: String!, $name: String!) {
  model(owner: $owner, name: $name) { viewerCan }
}"""

LATEST: Final = f"""query Latest($model: ID!, $by: ID!, $status: [VersionStatus!]!) {{
  model(id: $model) {{
    versions(
      first: 1
      filter: {{ createdBy: $by, status: $status }}
      orderBy: {{ field: NUMBER, direction: DESC }}
    ) {{ nodes {{ {_VERSION} }} }}
  }}
}}"""

UPLOADS: Final = f"""query Uploads($id: ID!, $after: Cursor) {{
  node(id: $id) {{ ... on ModelVersion {{
    uploads(first: 100, after: $after) {{
      nodes {{ {_UPLOAD} }}
      pageInfo {{ endCursor hasNextPage }}
    }}
  }} }}
}}"""

UPLOADS_BY_ID: Final = f"""query UploadsById($ids: [ID!]!) {{
  nodes(ids: $ids) {{ ... on Upload {{ {_UPLOAD} file {{ sha256 }} }} }}
}}"""

CREATE_MODEL: Final = """mutation CreateModel($input: CreateModelInput!) {
  createModel(input: $input) {
    model { id fullName visibility }
    userErrors { code message path }
  }
}"""

CREATE_VERSION: Final = f"""mutation CreateVersion($input: CreateModelVersionInput!) {{
  createModelVersion(input: $input) {{
    modelVersion {{ {_VERSION} }}
    userErrors {{ code message path }}
  }}
}}"""

CREATE_UPLOADS: Final = f"""mutation CreateUploads($input: CreateUploadsInput!) {{
  createUploads(input: $input) {{
    uploads {{ {_UPLOAD} }}
    userErrors {{ code message path }}
  }}
}}"""

COMPLETE_UPLOAD: Final = f"""mutation CompleteUpload($input: CompleteUploadInput!) {{
  completeUpload(input: $input) {{
    upload {{ {_UPLOAD} }}
    userErrors {{ code message path }}
  }}
}}"""

ABORT_UPLOAD: Final = """mutation AbortUpload($input: AbortUploadInput!) {
  abortUpload(input: $input) { userErrors { code message path } }
}"""

PUBLISH: Final = f"""mutation Publish($input: PublishModelVersionInput!) {{
  publishModelVersion(input: $input) {{
    modelVersion {{ {_VERSION} }}
    job {{ id }}
    userErrors {{ code message path }}
  }}
}}"""

SET_ALIAS: Final = """mutation SetAlias($input: SetModelAliasInput!) {
  setModelAlias(input: $input) {
    userErrors { code message path }
  }
}"""

JOB: Final = """subscription Job($id: ID!, $after: Cursor) {
  jobProgress(id: $id, after: $after) {
    cursor
    job { state error { code message } progress { current total message } }
  }
}"""

EXPORT: Final = """mutation Export($input: BulkExportInput!) {
  bulkExport(input: $input) {
    job { id }
    userErrors { code message path }
  }
}"""

EXPORT_JOB: Final = """subscription ExportJob($id: ID!, $after: Cursor) {
  jobProgress(id: $id, after: $after) {
    cursor
    job {
      state
      error { code message }
      progress { current total ratePerSecond etaSeconds message }
    }
  }
}"""

EXPORTED: Final = """query Exported($id: ID!) {
  node(id: $id) { ... on Job { kind state error { code message } result downloadUrl } }
}"""

CANCEL_JOB: Final = """mutation CancelJob($input: CancelJobInput!) {
  cancelJob(input: $input) { userErrors { code message path } }
}"""

REASON: Final = """query Reason($id: ID!) {
  node(id: $id) { ... on ModelVersion { statusReason } }
}"""

FINDINGS: Final = """query Findings($id: ID!, $after: Cursor) {
  node(id: $id) { ... on ModelVersion {
    files(first: 100, after: $after) {
      nodes { path scan { verdict findings { severity rule detail } } }
      pageInfo { endCursor hasNextPage }
    }
  } }
}"""
