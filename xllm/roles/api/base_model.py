"""What all models of request bodies are built from."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class ApiModel(BaseModel):
    """Strict, and deaf to fields that it does not know."""

    model_config = ConfigDict(
        strict=True, extra="ignore", frozen=True, allow_inf_nan=False, populate_by_name=True
    )
