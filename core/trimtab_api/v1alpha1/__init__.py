"""The first version of the API: three kinds, and the list that everything generated is made from."""

from trimtab_api.v1alpha1.finetunejob import FINE_TUNE_JOB, FineTuneJob
from trimtab_api.v1alpha1.mergejob import MERGE_JOB, MergeJob
from trimtab_api.v1alpha1.modeldeployment import MODEL_DEPLOYMENT, ModelDeployment

RESOURCES = (FINE_TUNE_JOB, MERGE_JOB, MODEL_DEPLOYMENT)

__all__ = [
    "FINE_TUNE_JOB",
    "MERGE_JOB",
    "MODEL_DEPLOYMENT",
    "RESOURCES",
    "FineTuneJob",
    "MergeJob",
    "ModelDeployment",
]
