"""A variable that is nearly a knob is not passed over in silence, and other programs' variables are left alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from moe_bench.config.gather import CLUSTERS, COMMON, MODELS
from moe_bench.config.knobs import KNOBS
from moe_bench.config.misspelt import FOREIGN, OTHERS, misspelt, within
from moe_bench.errors import ConfigError
from tests.support.projects import MODEL, REPOSITORY, Project

SLURM_JOB = """
SLURM_JOB_ID SLURM_JOBID SLURM_JOB_NAME SLURM_JOB_NODELIST SLURM_NODELIST SLURM_NNODES SLURM_JOB_NUM_NODES SLURM_NTASKS
SLURM_NPROCS SLURM_NODEID SLURM_PROCID SLURM_LOCALID SLURM_CPUS_ON_NODE SLURM_GPUS_PER_NODE SLURM_GPUS_ON_NODE
SLURM_TASKS_PER_NODE SLURM_JOB_PARTITION SLURM_JOB_ACCOUNT SLURM_JOB_QOS SLURM_CLUSTER_NAME SLURM_SUBMIT_DIR
SLURM_SUBMIT_HOST SLURM_MPI_TYPE SLURM_STEP_ID SLURM_CONF SLURM_PRIO_PROCESS SLURMD_NODENAME SBATCH_ACCOUNT
SBATCH_PARTITION SBATCH_EXCLUSIVE SRUN_DEBUG SLURM_UMASK SLURM_TOPOLOGY_ADDR SLURM_RESTART_COUNT ROCR_VISIBLE_DEVICES
GPU_DEVICE_ORDINAL CUDA_VISIBLE_DEVICES TMPDIR ENVIRONMENT LOADEDMODULES MODULEPATH MODULESHOME LMOD_CMD __LMOD_REF
MODULEPATH_ROOT BASH_FUNC_ml%% BASH_FUNC_module%% MANPATH LD_LIBRARY_PATH PMIX_RANK PMIX_NAMESPACE PMI_RANK PMI_SIZE
OMPI_COMM_WORLD_RANK OMPI_MCA_btl I_MPI_FABRICS UCX_TLS NCCL_DEBUG NCCL_IB_HCA NCCL_SOCKET_IFNAME ENROOT_CACHE_PATH
RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK ROLE_RANK MASTER_ADDR MASTER_PORT TORCHELASTIC_RUN_ID
TORCHELASTIC_MAX_RESTARTS TORCH_NCCL_ASYNC_ERROR_HANDLING NODE_RANK
"""
SHELL = """
HOME USER LOGNAME SHELL TERM COLORTERM PATH PWD OLDPWD SHLVL LANG LANGUAGE LC_ALL LC_CTYPE TZ EDITOR VISUAL PAGER LESS
LESSOPEN LS_COLORS HOSTNAME HOSTTYPE MACHTYPE OSTYPE MAIL DISPLAY WAYLAND_DISPLAY XAUTHORITY SSH_CLIENT SSH_CONNECTION
SSH_TTY SSH_AUTH_SOCK SSH_AGENT_PID DBUS_SESSION_BUS_ADDRESS XDG_RUNTIME_DIR XDG_SESSION_ID XDG_DATA_DIRS TMUX TMUX_PANE
STY VIRTUAL_ENV VIRTUAL_ENV_PROMPT CONDA_PREFIX CONDA_DEFAULT_ENV CONDA_EXE CONDA_SHLVL PYENV_ROOT PYENV_VERSION PYENV_DIR
PYTHONPATH PYTHONUNBUFFERED PYTHONDONTWRITEBYTECODE PIP_INDEX_URL PIP_CONSTRAINT UV_INDEX_URL UV_CACHE_DIR http_proxy
https_proxy no_proxy ftp_proxy all_proxy HTTP_PROXY HTTPS_PROXY NO_PROXY npm_config_prefix NVM_DIR NODE_PATH NODE_OPTIONS
JAVA_HOME JAVA_PATH GOPATH GOROOT CARGO_HOME RUSTUP_HOME CC CXX CFLAGS CXXFLAGS LDFLAGS MAKEFLAGS MAKELEVEL PKG_CONFIG_PATH
CMAKE_PREFIX_PATH INCLUDE LIB DEBIAN_FRONTEND WINDOWID VTE_VERSION GPG_AGENT_INFO KRB5CCNAME SUDO_USER SUDO_UID HISTSIZE
PS1 PROMPT_COMMAND which_declare ls_color PROFILEREAD PROFILEHOME MODE MODEL_DIR OPTIND UID EUID PPID
"""
CI_MACHINE = """
CI CI_COMMIT_SHA CI_JOB_ID CI_PIPELINE_ID CI_PROJECT_DIR CI_RUNNER_ID CI_REGISTRY CI_SERVER GITLAB_CI GITLAB_USER_ID
GITHUB_ACTION GITHUB_ACTIONS GITHUB_ACTOR GITHUB_ENV GITHUB_OUTPUT GITHUB_PATH GITHUB_RUN_ID GITHUB_RUN_NUMBER
GITHUB_TOKEN GITHUB_WORKSPACE RUNNER_ARCH RUNNER_NAME RUNNER_OS RUNNER_TEMP RUNNER_WORKSPACE ACTIONS_RUNTIME_TOKEN
ACTIONS_CACHE_URL ImageOS ImageVersion AGENT_TOOLSDIRECTORY BUILD_ID BUILD_NUMBER BUILD_TAG BUILD_URL JENKINS_HOME
JENKINS_URL JOB_NAME JOB_BASE_NAME JOB_URL RUN_DISPLAY_URL RUN_CHANGES_DISPLAY_URL NODE_NAME NODE_LABELS EXECUTOR_NUMBER
STAGE_NAME WORKSPACE_TMP BRANCH_NAME CHANGE_ID TRAVIS CIRCLECI BUILDKITE RUNTIME NODES MODELS DATASETS PYTEST_CURRENT_TEST
KUBERNETES_SERVICE_HOST KUBERNETES_PORT HOST_IP POD_NAME POD_NAMESPACE AWS_REGION AWS_PROFILE AZURE_CLIENT_ID
"""
CONTAINER = """
NVIDIA_VISIBLE_DEVICES NVIDIA_DRIVER_CAPABILITIES NVIDIA_PRODUCT_NAME NVIDIA_PYTORCH_VERSION NVIDIA_BUILD_ID CUDA_VERSION
CUDA_HOME CUDNN_VERSION NCCL_VERSION PYTORCH_VERSION PYTORCH_BUILD_VERSION PYTORCH_BUILD_NUMBER PYTORCH_HOME
TORCH_CUDA_ARCH_LIST TORCH_ALLOW_TF32_CUBLAS_OVERRIDE TENSORBOARD_PORT TRANSFORMER_ENGINE_VERSION TRTVERSION TRITON_VERSION
MODEL_OPT_VERSION COCOAPI_VERSION DALI_VERSION OPENMPI_VERSION OPENUCX_VERSION OPAL_PREFIX USE_EXPERIMENTAL_CUDNN_V8_API
WANDB_BASE_URL WANDB_DIR WANDB_NAME WANDB_NOTES WANDB_RUN_ID WANDB_TAGS WANDB_SILENT WANDB_START_METHOD WANDB_HTTP_TIMEOUT
HF_HOME HF_TOKEN HUGGING_FACE_HUB_TOKEN TRANSFORMERS_CACHE TRANSFORMERS_OFFLINE TOKENIZERS_PARALLELISM OMP_NUM_THREADS
MKL_NUM_THREADS NVTE_FUSED_ATTN NVTE_WITH_USERBUFFERS MPI_HOME NVLINK_DOMAIN_SIZE USE_MNNVL
NUM_OF_HYBRID_EP_RANKS_PER_NVLINK_DOMAIN TRITON_CACHE_DIR CUDA_DEVICE_MAX_CONNECTIONS PYTORCH_CUDA_ALLOC_CONF
"""


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("MOE_TOKEN_DISPATCHR", "MOE_TOKEN_DISPATCHER"),
        ("GPUS_PER_NOD", "GPUS_PER_NODE"),
        ("WANDB_PROJEKT", "WANDB_PROJECT"),
        ("NNODE", "NNODES"),
        ("SEQLEN", "SEQ_LEN"),
        ("DRYRUN", "DRY_RUN"),
        ("NUM_LAYER", "NUM_LAYERS"),
        ("MEGATORN_PATH", "MEGATRON_PATH"),
        ("MCORE_RELASE_VERSIN", "MCORE_RELEASE_VERSION"),
        ("OPTIMIZER_OFLOAD", "OPTIMIZER_OFFLOAD"),
        ("A2A_OVERLAPP", "A2A_OVERLAP"),
        ("MOE_BENCH_DEVCE", "MOE_BENCH_DEVICE"),
        ("tp", "TP"),
        ("Gbs", "GBS"),
        ("model", "MODEL"),
    ],
)
def test_what_is_nearly_a_knob_is_refused_with_the_knob(written: str, meant: str) -> None:
    (found,) = misspelt([written], KNOBS)
    assert (found.name, found.meant, found.is_certain) == (written, meant, True)


@pytest.mark.parametrize("names", [SLURM_JOB, SHELL, CI_MACHINE, CONTAINER])
def test_other_programs_variables_are_never_refused(names: str) -> None:
    assert [one for one in misspelt(names.split(), KNOBS) if one.is_certain] == []


def test_a_name_of_a_likely_other_program_is_said_and_not_refused(tmp_path: Path) -> None:
    notes = Project(tmp_path).resolve({"NODES": "4", "MODELS": "/models"}).notes
    assert "NODES=4 (environment) is no knob; did you mean NNODES?" in notes
    assert "MODELS=/models (environment) is no knob; did you mean MODEL?" in notes


@pytest.mark.parametrize("prefix", FOREIGN)
def test_a_foreign_prefix_hides_no_knob(prefix: str) -> None:
    assert [name for name in KNOBS if name.startswith(prefix)] == []


def test_every_variable_of_the_projects_own_prefix_is_known() -> None:
    sources = [
        path for end in ("py", "sh", "j2") for path in (REPOSITORY / "moe_bench").rglob(f"*.{end}")
    ]
    found = {
        name for path in sources for name in re.findall(r"MOE_BENCH_[A-Z_]+", path.read_text())
    }
    own = {
        name for name in found if not name.startswith("MOE_BENCH_CONF_")
    }  # conf.sh's, which only it sees
    assert own - {"MOE_BENCH_"} <= {*OTHERS, *KNOBS}


def test_every_misspelt_variable_is_named_at_once_and_nothing_is_resolved(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        Project(tmp_path).resolve({"GPUS_PER_NOD": "4", "tp": "2", "WANDB_API_KEYS": "s3cret"})
    text = str(error.value)
    assert "GPUS_PER_NOD=4 (environment) is no knob; did you mean GPUS_PER_NODE?" in text
    assert "tp=2 (environment) is no knob; did you mean TP?" in text
    assert "s3cret" not in text


def test_a_key_under_a_misspelt_name_is_not_shown(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean WANDB_API_KEY") as error:
        Project(tmp_path).resolve({"WANDB_API_KY": "s3cret"})
    assert "s3cret" not in str(error.value)


def test_a_name_that_a_file_mentions_is_meant(tmp_path: Path) -> None:
    project = Project(tmp_path)
    project.write(f"{CLUSTERS}/local.conf", "# MASTER_PORTS is our proxy's\n")
    assert project.resolve({"MASTER_PORTS": "1"}).notes == ()
    project.write(COMMON, "export SEQ_LEN=${SEQ_LENG:-256}\n")
    assert project.resolve({"SEQ_LENG": "512", "MASTER_PORTS": "1"}).knobs["SEQ_LEN"].value == "512"


def test_a_misspelt_knob_of_a_conf_file_is_refused_with_its_line(tmp_path: Path) -> None:
    project = Project(tmp_path)
    project.write(f"{CLUSTERS}/local.conf", "\nexport GPUS_PER_NOD=${GPUS_PER_NOD:-4}\n")
    with pytest.raises(ConfigError, match=r"GPUS_PER_NOD=4 \(.*local.conf:2\) .*GPUS_PER_NODE"):
        project.resolve()


def test_a_variable_that_a_conf_file_uses_itself_is_left_alone(tmp_path: Path) -> None:
    project = Project(tmp_path)
    project.write(
        f"{CLUSTERS}/local.conf", "DATA_PATHS_=/data\nexport DATA_PATH=$DATA_PATHS_/text\n"
    )
    assert project.resolve().knobs["DATA_PATH"].value == "/data/text"


def test_a_misspelt_name_of_the_models_own_defaults_is_refused(tmp_path: Path) -> None:
    project = Project(tmp_path)
    project.write(f"{MODELS}/Tiny-Test.yaml", f"DEFAULTS:\n  TRAIN_ITER: 5\n{MODEL}")
    with pytest.raises(ConfigError, match=r"TRAIN_ITER=5 \(.*Tiny-Test.yaml:2\) .*TRAIN_ITERS"):
        project.resolve()


def test_a_name_of_the_models_own_defaults_has_its_misspellings_too(tmp_path: Path) -> None:
    project = Project(tmp_path)
    project.write(f"{MODELS}/Tiny-Test.yaml", f"DEFAULTS:\n  DENSE_LAYERS: 1\n{MODEL}")
    project.add_flags("--moe-layer-freq: ([0]*${DENSE_LAYERS}+[1]*3)")
    with pytest.raises(ConfigError, match=r"DENSE_LAYER=2 .*did you mean DENSE_LAYERS"):
        project.resolve({"DENSE_LAYER": "2"})


letters = st.text(alphabet="ABC_", max_size=6)


@settings(deadline=None)
@given(letters, letters)
def test_within_is_the_edit_distance_with_swaps(one: str, other: str) -> None:
    distance = _distance(one, other)
    for limit in range(4):
        assert within(one, other, limit) == (distance <= limit)


def _distance(one: str, other: str) -> int:
    """Optimal string alignment by the textbook table."""
    rows = [[i + j for j in range(len(other) + 1)] for i in range(len(one) + 1)]
    for i in range(1, len(one) + 1):
        for j in range(1, len(other) + 1):
            rows[i][j] = min(
                rows[i - 1][j] + 1,
                rows[i][j - 1] + 1,
                rows[i - 1][j - 1] + (one[i - 1] != other[j - 1]),
            )
            if i > 1 and j > 1 and one[i - 2 : i] == other[j - 1] + other[j - 2]:
                rows[i][j] = min(rows[i][j], rows[i - 2][j - 2] + 1)
    return rows[-1][-1]
