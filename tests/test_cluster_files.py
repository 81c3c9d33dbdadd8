"""The cluster files hold what they promise: seen by Ray's own code against a simulated EC2, by schemas, by parsing."""

import os
import re
import subprocess
import threading
import tomllib
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "cluster"
KUBERAY = sorted((CLUSTER / "kuberay").glob("*.yaml"))
OPERATOR = "198.51.100.0/24"


def loaded(name):
    return yaml.safe_load((CLUSTER / name).read_text())


def pinned(package):
    return re.search(rf"^{package}==(.+)$", (ROOT / "constraints.txt").read_text(), re.M)[1]


# AWS: bootstrapped and launched by Ray's real provider; moto is the EC2.


@pytest.fixture
def ec2(tmp_path, monkeypatch):
    """boto3's EC2 client of an account where aws-account.yaml was deployed, and the outputs of that."""
    import boto3
    from moto import mock_aws
    from ray.autoscaler._private.aws import config, utils

    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "none")
    monkeypatch.setenv("HOME", str(tmp_path))  # Ray writes the key it makes into ~/.ssh
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-west-2")
    caches = [utils.resource_cache, utils.client_cache, config._get_subnets_or_die]  # of the account before
    threads = set(threading.enumerate())
    with mock_aws():
        for cache in caches:
            cache.cache_clear()
        client = boto3.client("ec2")
        yield client
    for cache in caches:
        cache.cache_clear()
    assert set(threading.enumerate()) <= threads


def deployed(ec2, cidr=OPERATOR):
    """What `aws cloudformation deploy` of aws-account.yaml puts out."""
    import boto3

    vpc = ec2.describe_vpcs()["Vpcs"][0]["VpcId"]
    given = {"VpcId": vpc, "OperatorCidr": cidr, "Bucket": "pictures"}
    cloud = boto3.client("cloudformation")
    cloud.create_stack(
        StackName="millstream",
        TemplateBody=(CLUSTER / "aws-account.yaml").read_text(),
        Parameters=[{"ParameterKey": key, "ParameterValue": value} for key, value in given.items()],
        Capabilities=["CAPABILITY_NAMED_IAM"],
    )
    outputs = cloud.describe_stacks(StackName="millstream")["Stacks"][0]["Outputs"]
    return {output["OutputKey"]: output["OutputValue"] for output in outputs}


def edited(ec2, group):
    """aws.yaml, with the two ids put in where it says that they belong."""
    text, ami = (CLUSTER / "aws.yaml").read_text(), ec2.describe_images()["Images"][0]["ImageId"]
    assert text.count("sg-0123456789abcdef0") == text.count("ami-0123456789abcdef0") == 1
    return yaml.safe_load(text.replace("sg-0123456789abcdef0", group).replace("ami-0123456789abcdef0", ami))


def bootstrapped(config):
    """As `ray up` makes it ready: defaults, schema, resources of the machines, IAM, keys, subnets, security groups."""
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(config)
    validate_config(config)
    return AWSNodeProvider.bootstrap_config(AWSNodeProvider.fillout_available_node_types_resources(config))


def launched(ec2, config, kind):
    """EC2's own description of a machine of node type `kind`, and of its disk; tagged as Ray tags it."""
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    tags = {"ray-node-type": "worker", "ray-launch-config": "x", "ray-user-node-type": kind, "ray-node-name": "n"}
    made = provider.create_node(config["available_node_types"][kind]["node_config"], tags, 1)
    (instance,) = ec2.describe_instances(InstanceIds=list(made))["Reservations"][0]["Instances"]
    (disk,) = [one["Ebs"]["VolumeId"] for one in instance["BlockDeviceMappings"]]
    return instance, ec2.describe_volumes(VolumeIds=[disk])["Volumes"][0]


def ingress(ec2, instance):
    groups = [group["GroupId"] for group in instance["SecurityGroups"]]
    rules = ec2.describe_security_groups(GroupIds=groups)["SecurityGroups"]
    return [rule for group in rules for rule in group["IpPermissions"]]


def open_to(rules):
    v4 = {one["CidrIp"] for rule in rules for one in rule["IpRanges"]}
    return v4 | {one["CidrIpv6"] for rule in rules for one in rule["Ipv6Ranges"]}


def test_our_nodes_on_ec2_are_spot_or_not_private_encrypted_and_of_least_rights(ec2, tmp_path):
    config = bootstrapped(edited(ec2, deployed(ec2)["SecurityGroup"]))
    markets = {"head": None, "gpu_ondemand": None, "gpu_spot": "spot"}
    assert set(config["available_node_types"]) == set(markets)
    for kind, market in markets.items():
        instance, disk = launched(ec2, config, kind)
        assert instance.get("InstanceLifecycle") == market
        tags = {tag["Key"]: tag["Value"] for tag in instance["Tags"]}
        assert tags["ray-cluster-name"] == "millstream"  # what the head's policy goes by
        assert tags["ray-user-node-type"] == kind
        assert instance["MetadataOptions"]["HttpTokens"] == "required"
        assert instance["MetadataOptions"]["HttpPutResponseHopLimit"] == 2
        profile = "millstream-head" if kind == "head" else "millstream-worker"
        assert instance["IamInstanceProfile"]["Arn"].endswith(f":instance-profile/{profile}")
        assert disk["Encrypted"]
        assert disk["VolumeType"] == "gp3"
        rules = ingress(ec2, instance)
        assert open_to(rules) == {OPERATOR}
        assert [(rule["FromPort"], rule["ToPort"]) for rule in rules if rule["IpRanges"]] == [(22, 22)]
    resources = config["available_node_types"]["gpu_spot"]["resources"]
    assert resources["GPU"] == 4
    assert config["available_node_types"]["head"]["resources"]["CPU"] == 0
    assert [key.name for key in (tmp_path / ".ssh").iterdir()]  # and so not in anybody's home


def test_ray_adds_ssh_from_everywhere_to_a_security_group_that_it_makes_itself(ec2):
    """Why the group comes from aws-account.yaml, and what `cluster plan` says of files without one."""
    config = edited(ec2, "")
    rule = {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, "IpRanges": [{"CidrIp": OPERATOR}]}
    config["provider"]["security_group"] = {"GroupName": "ours", "IpPermissions": [rule]}
    for given in config["available_node_types"].values():
        given["node_config"] = {key: val for key, val in given["node_config"].items() if key != "SecurityGroupIds"}
    deployed(ec2)
    instance, _ = launched(ec2, bootstrapped(config), "head")
    assert open_to(ingress(ec2, instance)) == {OPERATOR, "0.0.0.0/0"}


def test_the_head_may_touch_only_its_own_cluster_and_workers_only_the_bucket(ec2):
    import boto3

    deployed(ec2)
    iam = boto3.client("iam")

    def statements(role):
        attached = iam.list_attached_role_policies(RoleName=role)["AttachedPolicies"]
        found = []
        for policy in attached:
            version = iam.get_policy(PolicyArn=policy["PolicyArn"])["Policy"]["DefaultVersionId"]
            document = iam.get_policy_version(PolicyArn=policy["PolicyArn"], VersionId=version)["PolicyVersion"]
            found += document["Document"]["Statement"]
        for name in iam.list_role_policies(RoleName=role)["PolicyNames"]:
            document = iam.get_role_policy(RoleName=role, PolicyName=name)["PolicyDocument"]
            # moto has a stack's inline policies as Python would print them, which is YAML as JSON is.
            found += (yaml.safe_load(document) if isinstance(document, str) else document)["Statement"]
        return found

    def actions(statement):
        return [statement["Action"]] if isinstance(statement["Action"], str) else statement["Action"]

    for role in ("millstream-worker", "millstream-head"):
        assert any("s3:PutObject" in actions(statement) for statement in statements(role))
        for statement in statements(role):
            for action in actions(statement):
                assert "*" not in action
                if action.startswith("s3:"):
                    assert statement["Resource"] in ("arn:aws:s3:::pictures", "arn:aws:s3:::pictures/*")
                if not action.startswith("ec2:Describe"):
                    assert statement["Resource"] != "*"
                if action in ("ec2:TerminateInstances", "iam:PassRole") or ":instance/*" in str(statement["Resource"]):
                    assert "Condition" in statement
    assert all(action.startswith("s3:") for one in statements("millstream-worker") for action in actions(one))
    passed = [one["Resource"] for one in statements("millstream-head") if "iam:PassRole" in actions(one)]
    assert [arn.rpartition("/")[2] for arn in passed] == ["millstream-worker"]
    started = str([one["Resource"] for one in statements("millstream-head") if "ec2:RunInstances" in actions(one)])
    assert "security-group/sg-" in started
    assert "security-group/*" not in started


@pytest.mark.parametrize("cidr", ["0.0.0.0/0", "203.0.113.0/0", "everywhere", "203.0.113.0"])
def test_ssh_from_everywhere_is_refused_by_the_template(cidr):
    parameter = re.search(r'AllowedPattern: "(.+)"', (CLUSTER / "aws-account.yaml").read_text())[1]
    pattern = parameter.replace("\\\\", "\\")
    assert not re.fullmatch(pattern, cidr)
    assert re.fullmatch(pattern, "203.0.113.0/24")


# Both files of `ray up`.


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml"])
def test_ray_takes_the_file_and_fills_in_nothing_that_matters(name):
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(loaded(name))
    validate_config(config)
    assert config["setup_commands"] == config["head_setup_commands"] == config["worker_setup_commands"] == []
    head, worker = (" ".join(config[f"{who}_start_ray_commands"]) for who in ("head", "worker"))
    assert "--dashboard-host=127.0.0.1" in head
    assert "python -m cluster.preemption" in worker
    options = " ".join(config["docker"]["run_options"])
    for option in ("RAY_AUTH_MODE=token", "RAY_JOB_STOP_WAIT_TIME_S=120", "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S="):
        assert option in options
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    assert not config["docker"]["image"].endswith((":latest", ":nightly"))
    types = config["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0}
    assert types["head"]["max_workers"] == 0
    assert types["gpu_spot"]["priority"] > types["gpu_ondemand"]["priority"]
    assert {kind: given["labels"]["market"] for kind, given in types.items()} == {
        "head": "on-demand", "gpu_ondemand": "on-demand", "gpu_spot": "spot"}  # fmt: skip
    assert config["max_workers"] > 0 == types["gpu_spot"]["min_workers"] == types["gpu_ondemand"]["min_workers"]


def test_aws_stops_no_machine_whose_disk_would_cost_on():
    assert loaded("aws.yaml")["provider"]["cache_stopped_nodes"] is False


def test_google_nodes_have_network_account_and_market_of_ours():
    types = loaded("gcp.yaml")["available_node_types"]
    for kind, given in types.items():
        node = given["node_config"]
        assert node["networkInterfaces"][0]["subnetwork"].endswith("/millstream")  # or Ray takes the first it finds
        assert node["tags"] == {"items": ["millstream"]}  # what the firewall rules go by
        account = "millstream-head@" if kind == "head" else "millstream-worker@"
        assert node["serviceAccounts"][0]["email"].startswith(account)
        scheduling = node.get("scheduling", {})
        assert (scheduling.get("provisioningModel") == "SPOT") == (kind == "gpu_spot")
        assert kind == "head" or scheduling["onHostMaintenance"] == "TERMINATE"


@pytest.mark.parametrize("cidr", ["0.0.0.0/0", "203.0.113.7", ""])
def test_ssh_from_everywhere_is_refused_on_google_too(cidr, tmp_path):
    """Before anything is asked of gcloud, which a marker stands in for."""
    marker = tmp_path / "gcloud"
    marker.write_text(f"#!/bin/sh\necho $@ >> {tmp_path}/asked\n")
    marker.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def run(operator):
        command = ["bash", str(CLUSTER / "gcp-account.sh"), "project", "us-west1", "bucket", operator]
        return subprocess.run(command, env=environment, capture_output=True, check=False).returncode

    assert run(cidr) == 2
    assert not (tmp_path / "asked").exists()
    assert run(OPERATOR) == 0
    asked = (tmp_path / "asked").read_text()
    assert f"--source-ranges={OPERATOR}" in asked
    assert "0.0.0.0/0" not in asked
    assert not re.search(r"roles/(owner|editor|compute\.admin|storage\.admin|storage\.objectAdmin)", asked)


# KubeRay.


def documents(kind=None):
    for path in KUBERAY:
        for document in yaml.safe_load_all(path.read_text()):
            if kind in (None, document["kind"]):
                yield path.name, document


def templates():
    """(file, role, pod template) of every pod that the manifests make."""
    for file, document in documents():
        spec = document.get("spec", {})
        if document["kind"] == "CronJob":
            yield file, "submit", spec["jobTemplate"]["spec"]["template"]
        if not document["apiVersion"].startswith("ray.io/"):
            continue
        spec = spec.get("jobTemplate", spec)
        if "submitterPodTemplate" in spec:
            yield file, "submit", spec["submitterPodTemplate"]
        cluster = spec.get("rayClusterSpec") or (spec if document["kind"] == "RayCluster" else {})
        if cluster:
            yield file, "head", cluster["headGroupSpec"]["template"]
            yield from ((file, "worker", group["template"]) for group in cluster["workerGroupSpecs"])


def clusters():
    for file, document in documents():
        spec = document.get("spec", {})
        if document["kind"] == "RayCluster":
            yield file, spec
        elif "rayClusterSpec" in spec:
            yield file, spec["rayClusterSpec"]


def test_kubernetes_itself_takes_every_document_and_every_pod():
    """Unknown fields are refused. The fields of KubeRay's own kinds are not seen to here."""
    seen = set()
    for _, document in documents():
        if not document["apiVersion"].startswith("ray.io/"):
            kubernetes_validate.validate(document, "1.37", strict=True)
            seen.add(document["kind"])
    assert seen == {"ServiceAccount", "NetworkPolicy", "PodDisruptionBudget", "CronJob"}
    for _, _, template in templates():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x", **template["metadata"]}}
        kubernetes_validate.validate({**pod, "spec": template["spec"]}, "1.37", strict=True)
    assert [role for _, role, _ in templates()].count("worker") == 4


def test_no_pod_is_root_or_may_become_so_or_has_more_of_kubernetes_than_the_head():
    for file, role, template in templates():
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"], (file, role)
        assert spec["securityContext"]["runAsUser"] > 0
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}  # fmt: skip
            assert not container["image"].endswith(":latest")
        assert spec["serviceAccountName"] == ("millstream-head" if role == "head" else "millstream")
        assert role == "head" or spec["automountServiceAccountToken"] is False


def test_a_pod_that_is_ended_has_the_time_for_its_drain():
    for _, role, template in templates():
        if role == "submit":
            continue
        (container,) = template["spec"]["containers"]
        env = {one["name"]: one["value"] for one in container["env"]}
        drain = float(env["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        if role == "worker":
            command = container["lifecycle"]["preStop"]["exec"]["command"]
            assert command[:4] == ["python", "-m", "cluster.preemption", "--now"]
            drain += float(command[command.index("--deadline") + 1])
        else:
            assert float(env["RAY_JOB_STOP_WAIT_TIME_S"]) >= 60
        assert template["spec"]["terminationGracePeriodSeconds"] > drain


def test_clusters_ask_for_the_token_scale_to_zero_and_prefer_spot():
    assert len(list(clusters())) == 2
    for _, spec in clusters():
        assert spec["rayVersion"] == pinned("ray")
        assert spec["authOptions"] == {"mode": "token", "secretName": "millstream-auth"}
        assert spec["enableInTreeAutoscaling"]
        assert spec["autoscalerOptions"]["version"] == "v2"
        assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
        groups = {group["labels"]["market"]: group for group in spec["workerGroupSpecs"]}
        assert groups["spot"]["priority"] > groups["on-demand"]["priority"]
        assert all(group["minReplicas"] == group["replicas"] == 0 for group in groups.values())
        selectors = [group["template"]["spec"]["nodeSelector"] for group in groups.values()]
        assert [selector["karpenter.sh/capacity-type"] for selector in selectors] == ["spot", "on-demand"]
        assert all(group["template"]["spec"]["restartPolicy"] == "Never" for group in groups.values())  # autoscaler v2


def test_only_ray_and_submitters_reach_the_dashboard():
    ((_, policy),) = documents("NetworkPolicy")
    spec = policy["spec"]
    chosen = spec["podSelector"]["matchLabels"]
    admitted = [peer["podSelector"]["matchLabels"] for rule in spec["ingress"] for peer in rule["from"]]
    assert spec["policyTypes"] == ["Ingress"]
    assert all(admitted)
    for _, role, template in templates():
        labels = template["metadata"]["labels"].items()
        assert (chosen.items() <= labels) == (role != "submit")
        assert any(peer.items() <= labels for peer in admitted)
    ports = [rule.get("ports") for rule in spec["ingress"]]
    assert ports == [None, [{"protocol": "TCP", "port": 8265}]]


def test_a_drain_of_machines_spares_the_head_of_the_cluster_that_stands():
    ((_, budget),) = documents("PodDisruptionBudget")
    ((_, cluster),) = documents("RayCluster")
    assert budget["spec"]["minAvailable"] == 1
    theirs = cluster["spec"]["headGroupSpec"]["template"]["metadata"]["labels"]
    by_kuberay = {"ray.io/cluster": cluster["metadata"]["name"], "ray.io/node-type": "head"}
    assert budget["spec"]["selector"]["matchLabels"].items() <= (theirs | by_kuberay).items()


def test_a_night_is_one_night_and_its_words_are_what_submit_takes():
    from jobs.command import parse
    from jobs.submit import Args

    ((_, cron),) = documents("CronJob")
    spec = cron["spec"]
    assert spec["concurrencyPolicy"] == "Forbid"
    assert spec["startingDeadlineSeconds"] >= 60  # Kubernetes looks every 10 s: far less would miss nights
    assert spec["timeZone"]
    assert spec["jobTemplate"]["spec"]["backoffLimit"] > 0
    (container,) = spec["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    words = container["command"] + container["args"]
    assert words[:2] == ["millstream", "submit"]
    own, verb = words[2 : words.index("--")], words[words.index("--") + 1 :]
    assert verb[0] == "nightly"
    args = parse(Args, "submit", own)
    ((_, cluster),) = documents("RayCluster")
    assert args.address == f"http://{cluster['metadata']['name']}-head-svc:8265"
    assert args.insecure
    assert args.store.startswith("s3://")
    assert verb[1].startswith("s3://")  # the head's machine has no file of ours
    (token,) = container["env"]
    assert token["name"] == "RAY_AUTH_TOKEN"
    assert token["valueFrom"]["secretKeyRef"] == {"name": "millstream-auth", "key": "auth_token"}


def test_names_leave_room_for_what_kuberay_appends():
    most = {"RayCluster": 53, "RayJob": 47, "RayCronJob": 36}
    seen = [kind for kind in most for _, document in documents(kind) if len(document["metadata"]["name"]) <= most[kind]]
    assert seen == list(most)


# The image.


def instructions():
    text = re.sub(r"\\\n", " ", (CLUSTER / "Dockerfile").read_text())
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            word, _, rest = line.partition(" ")
            yield word.upper(), rest.strip()


def test_the_image_has_the_pinned_ray_and_the_pinned_packages():
    steps = list(instructions())
    (image,) = [rest for word, rest in steps if word == "FROM"]
    assert image == f"rayproject/ray:{pinned('ray')}-py311-${{PLATFORM}}"
    python = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert python == ">=3.11"
    installs = [rest for word, rest in steps if word == "RUN" and "pip install" in rest]
    assert installs
    assert all("-c constraints.txt" in rest for rest in installs)
    assert pinned("torch").startswith("2.13.")  # whose CUDA versions the file names


def test_the_image_is_not_roots_and_takes_nothing_from_the_internet_but_packages():
    steps = list(instructions())
    assert [rest for word, rest in steps if word == "USER"] == ["ray"]
    assert not [word for word, _ in steps if word == "ADD"]
    assert not re.search(r"curl|wget|git clone|(?i:secret|password|token|key_id)=", str(steps))


def test_what_the_image_copies_is_there_and_is_all_that_docker_gets_to_see():
    copied = [part for word, rest in instructions() if word == "COPY" for part in rest.split()[1:-1]]
    assert all((ROOT / part).exists() for part in copied)
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert lines[lines.index("*") :][0] == "*"
    assert {line[1:] for line in lines if line.startswith("!")} == set(copied)


def test_all_files_run_the_same_image_name_and_it_is_ours_to_replace():
    images = {container["image"] for _, _, template in templates() for container in template["spec"]["containers"]}
    assert images == {loaded("aws.yaml")["docker"]["image"]}
    assert next(iter(images)) in (CLUSTER / "Dockerfile").read_text()
