"""What a cluster file would cost and who can reach it, said without asking any cloud, and never guessed."""

import copy
import json
from pathlib import Path

import pytest
import yaml

from cluster.plan import lines, plan

CLUSTER = Path(__file__).parents[1] / "cluster"
PRICES = {
    "date": "2026-11",
    "note": "",
    "sources": ["a test"],
    "aws": {
        "regions": ["us-west-2"],
        "machines": {
            "head.large": {"on_demand": 0.5, "spot": 0.2, "cpus": 8},
            "gpu.large": {"on_demand": 4.0, "spot": 1.5, "cpus": 48, "gpus": 4, "gpu": "L4"},
            "gpu.huge": {"on_demand": 50.0, "spot": 20.0, "cpus": 192, "gpus": 8, "gpu": "H100"},
        },
    },
    "gcp": {"regions": ["us-west1"], "machines": {"n2-standard-8": {"on_demand": 0.4, "spot": 0.1, "cpus": 8}}},
}
SPOT = {"InstanceMarketOptions": {"MarketType": "spot"}}


def node(machine, most=0, least=0, config=None, **more):
    return {"resources": {}, "min_workers": least, "max_workers": most,
            "node_config": {"InstanceType": machine, **(config or {})}, **more}  # fmt: skip


def ray_up(most=8, provider=None, **types):
    return {
        "cluster_name": "c",
        "max_workers": most,
        "idle_timeout_minutes": 10,
        "provider": {"type": "aws", "region": "us-west-2", **(provider or {})},
        "available_node_types": {"head": node("head.large"), **types},
        "head_node_type": "head",
    }


def pods(machine="gpu.large", market="spot", most=4, least=0, **more):
    selector = {"node.kubernetes.io/instance-type": machine, "karpenter.sh/capacity-type": market}
    box = {"name": "w", "resources": {"limits": {"cpu": "44", "nvidia.com/gpu": "4"}}}
    return {"groupName": f"{market}-pods", "minReplicas": least, "maxReplicas": most, "replicas": least,
            "template": {"spec": {"nodeSelector": selector, "containers": [box]}}, **more}  # fmt: skip


def ray_cluster(*groups, head=None, **more):
    template = {"spec": {"nodeSelector": {"node.kubernetes.io/instance-type": "head.large"}}}
    spec = {"enableInTreeAutoscaling": True, "headGroupSpec": {"template": template, **(head or {})}}
    return {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": {"name": "c"},
            "spec": {**spec, "workerGroupSpecs": list(groups), **more}}  # fmt: skip


def written(tmp_path, *documents, name="c.yaml"):
    path = tmp_path / name
    path.write_text(yaml.safe_dump_all(copy.deepcopy(documents)))
    return str(path)


def planned(tmp_path, *documents):
    return plan(written(tmp_path, *documents), PRICES)


def test_the_most_it_can_cost_is_the_dearest_that_max_workers_allows(tmp_path):
    types = {"spot": node("gpu.large", 8, config=SPOT), "fixed": node("gpu.large", 3)}
    found = planned(tmp_path, ray_up(8, **types))["cost"]
    assert found["most"] == {"usd_hour": 0.5 + 3 * 4 + 5 * 1.5, "known_usd_hour": 20.0,
                             "nodes": {"head": 1, "fixed": 3, "spot": 5}}  # fmt: skip
    assert found["ceiling"]["usd_hour"] == 0.5 + 8 * 4
    assert found["at_rest"]["usd_hour"] == 0.5
    assert found["at_rest"]["nodes"] == {"head": 1, "fixed": 0, "spot": 0}


def test_workers_that_must_be_there_take_their_room_though_others_are_dearer(tmp_path):
    types = {"cheap": node("gpu.large", 8, least=6, config=SPOT), "dear": node("gpu.huge", 8)}
    found = planned(tmp_path, ray_up(8, **types))
    assert found["cost"]["most"]["nodes"] == {"head": 1, "cheap": 6, "dear": 2}
    assert found["cost"]["at_rest"]["usd_hour"] == 0.5 + 6 * 1.5
    assert any("cheap scales down to 6" in line for line in lines(found))


def test_the_head_is_a_worker_too_where_its_type_says_so(tmp_path):
    config = ray_up(4)
    config["available_node_types"]["head"] = node("head.large", 4)
    assert planned(tmp_path, config)["cost"]["most"] == {"usd_hour": 2.5, "known_usd_hour": 2.5, "nodes": {"head": 5}}


def test_without_a_limit_of_its_own_a_type_may_fill_the_cluster(tmp_path):
    config = ray_up(5, fixed=node("gpu.large"))
    del config["available_node_types"]["fixed"]["max_workers"]
    assert planned(tmp_path, config)["cost"]["most"]["nodes"] == {"head": 1, "fixed": 5}


def test_an_unknown_machine_has_no_price_and_neither_has_the_sum(tmp_path):
    types = {"odd": node("x9.mega", 2), "fixed": node("gpu.large", 8)}
    found = planned(tmp_path, ray_up(8, **types))
    assert found["cost"]["most"]["usd_hour"] is None
    assert found["cost"]["most"]["known_usd_hour"] == 0.5 + 8 * 4
    assert found["cost"]["at_rest"]["usd_hour"] == 0.5
    assert any("odd" in line and "x9.mega" in line for line in found["unknown"])
    text = "\n".join(lines(found))
    assert "x9.mega, on-demand, price unknown" in text
    assert "at most: unknown, $32.50/h of it known" in text


def test_a_machine_that_cannot_run_leaves_the_sum_known(tmp_path):
    found = planned(tmp_path, ray_up(8, odd=node("x9.mega", 0)))
    assert found["cost"]["most"]["usd_hour"] == 0.5
    assert not [line for line in found["unknown"] if "x9.mega" in line]


def test_prices_of_one_region_are_not_taken_for_another(tmp_path):
    found = planned(tmp_path, ray_up(provider={"region": "eu-central-1"}))
    assert found["cost"]["at_rest"] == {"usd_hour": None, "known_usd_hour": 0.0, "nodes": {"head": 1}}
    assert "eu-central-1" in found["unknown"][0]


def test_gpus_attached_to_a_machine_have_no_price_here(tmp_path):
    attached = {"guestAccelerators": [{"acceleratorType": "nvidia-t4", "acceleratorCount": 1}]}
    config = ray_up(provider={"type": "gcp", "region": "us-west1", "project_id": "p"})
    config["available_node_types"]["head"]["node_config"] = {"machineType": "n2-standard-8", **attached}
    found = planned(tmp_path, config)
    assert found["nodes"][0]["usd_hour"] is None
    assert "nvidia-t4" in found["unknown"][0]


@pytest.mark.parametrize("scheduling", [{"provisioningModel": "SPOT"}, [{"preemptible": True}], {"preemptible": True}])
def test_spot_on_google_is_known_in_each_of_its_spellings(tmp_path, scheduling):
    config = ray_up(provider={"type": "gcp", "region": "us-west1", "project_id": "p"})
    config["available_node_types"]["head"]["node_config"] = {"machineType": "n2-standard-8", "scheduling": scheduling}
    assert planned(tmp_path, config)["cost"]["at_rest"]["usd_hour"] == 0.1


def test_ssh_is_open_to_everybody_unless_every_node_has_a_security_group_of_its_own(tmp_path):
    """Ray adds that rule beside those of the file; tests/test_cluster_files.py sees it do so."""
    group = {"GroupName": "g", "IpPermissions": [
        {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, "IpRanges": [{"CidrIp": "203.0.113.0/24"}]},
        {"IpProtocol": "tcp", "FromPort": 8000, "ToPort": 8999, "Ipv6Ranges": [{"CidrIpv6": "::/0"}]}]}  # fmt: skip
    config = ray_up(provider={"security_group": group})
    reach = planned(tmp_path, config)["reach"]
    assert {(way["who"], way["open"]) for way in reach} >= {
        ("0.0.0.0/0", True), ("203.0.113.0/24", False), ("::/0", True)}  # fmt: skip
    assert [way["what"] for way in reach if way["who"] == "::/0"] == ["tcp 8000-8999 of every node"]
    config["available_node_types"]["head"]["node_config"]["SecurityGroupIds"] = ["sg-1"]
    found = planned(tmp_path, config)
    assert not any(way["open"] for way in found["reach"])
    assert any("sg-1" in line for line in found["unknown"])


@pytest.mark.parametrize("commands", [None, ["ray start --head --dashboard-host=0.0.0.0"],
                                      ["ray start --head --dashboard-host 0.0.0.0"]])  # fmt: skip
def test_a_dashboard_that_listens_to_all_is_said_also_where_it_is_rays_default(tmp_path, commands):
    config = ray_up() | ({"head_start_ray_commands": commands} if commands else {})
    said = [way["what"] for way in planned(tmp_path, config)["reach"] if "8265" in way["what"]]
    assert said == ["dashboard and jobs, 8265: it listens on 0.0.0.0"]
    config["head_start_ray_commands"] = ["ray start --head --dashboard-host=127.0.0.1"]
    said = [way["what"] for way in planned(tmp_path, config)["reach"] if "8265" in way["what"]]
    assert "loopback only" in said[0]


def test_whether_a_token_is_asked_for(tmp_path):
    assert planned(tmp_path, ray_up())["token"] is False
    assert "who can reach what, WITHOUT ANY TOKEN:" in lines(planned(tmp_path, ray_up()))
    options = {"image": "i", "container_name": "c", "run_options": ["--env RAY_AUTH_MODE=token"]}
    assert planned(tmp_path, ray_up() | {"docker": options})["token"] is True
    assert planned(tmp_path, ray_cluster(authOptions={"mode": "token"}))["token"] is True
    assert planned(tmp_path, ray_cluster(authOptions={"mode": "disabled"}))["token"] is False


def test_when_a_worker_without_work_goes(tmp_path):
    types = {"a": node("gpu.large", 2), "b": node("gpu.large", 2, idle_timeout_s=90)}
    assert {one["name"]: one["idle_s"] for one in planned(tmp_path, ray_up(**types))["nodes"]} == {
        "head": None, "a": 600, "b": 90}  # fmt: skip
    groups = pods(), pods(market="on-demand", idleTimeoutSeconds=30)
    found = planned(tmp_path, ray_cluster(*groups, autoscalerOptions={"idleTimeoutSeconds": 120}))
    assert [one["idle_s"] for one in found["nodes"]] == [None, 120, 30]


def test_a_ray_cluster_counts_every_group_to_its_maximum(tmp_path):
    found = planned(tmp_path, ray_cluster(pods(most=4), pods(market="on-demand", most=2, numOfHosts=2)))
    assert found["cost"]["most"]["usd_hour"] == 0.5 + 4 * 1.5 + 4 * 4.0
    assert found["cost"]["at_rest"]["usd_hour"] == 0.5
    assert found["max_workers"] == 8
    assert [(one["cpus"], one["gpus"]) for one in found["nodes"][1:]] == [(44, 4), (44, 4)]


def test_without_the_autoscaler_replicas_stand(tmp_path):
    cluster = ray_cluster(pods(most=9, least=3), enableInTreeAutoscaling=False)
    found = planned(tmp_path, cluster)
    assert found["cost"]["at_rest"]["usd_hour"] == found["cost"]["most"]["usd_hour"] == 0.5 + 3 * 1.5
    assert any("do not scale" in line for line in lines(found))


def test_a_job_that_takes_its_cluster_down_costs_nothing_at_rest(tmp_path):
    spec = {"entrypoint": "x", "rayClusterSpec": ray_cluster(pods(least=1))["spec"]}
    job = {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {"name": "j"}, "spec": spec}
    assert planned(tmp_path, job)["cost"]["at_rest"]["usd_hour"] == 2.0
    spec["shutdownAfterJobFinishes"] = True
    found = planned(tmp_path, job)["cost"]
    assert found["at_rest"]["usd_hour"] == 0
    assert found["most"]["usd_hour"] == 0.5 + 4 * 1.5
    cron = {**job, "kind": "RayCronJob", "spec": {"schedule": "0 2 * * *", "jobTemplate": spec}}
    assert planned(tmp_path, cron)["cost"] == found


def test_a_job_on_a_standing_cluster_makes_no_machines(tmp_path):
    job = {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {"name": "j"},
           "spec": {"entrypoint": "x", "clusterSelector": {"ray.io/cluster": "c"}}}  # fmt: skip
    found = planned(tmp_path, job)
    assert found["nodes"] == []
    assert "ray.io/cluster=c" in found["notes"][0]


def test_a_pod_that_names_no_machine_has_no_price(tmp_path):
    group = pods()
    group["template"]["spec"]["nodeSelector"] = {}
    found = planned(tmp_path, ray_cluster(group))
    assert found["cost"]["most"]["usd_hour"] is None
    assert found["nodes"][1]["market"] is None
    assert "names no machine" in found["unknown"][0]


def test_a_pods_affinity_names_machine_and_market_as_well(tmp_path):
    group = pods()
    wanted = [{"key": "node.kubernetes.io/instance-type", "operator": "In", "values": ["gpu.large"]},
              {"key": "eks.amazonaws.com/capacityType", "operator": "In", "values": ["SPOT"]}]  # fmt: skip
    terms = {"nodeSelectorTerms": [{"matchExpressions": wanted}]}
    affinity = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": terms}}
    group["template"]["spec"] = {"affinity": affinity}
    found = planned(tmp_path, ray_cluster(group))["nodes"][1]
    assert (found["machine"], found["market"], found["usd_hour"]["spot"]) == ("gpu.large", "spot", 1.5)


def policy(ingress, selector=None):
    spec = {"podSelector": selector or {}, "policyTypes": ["Ingress"], "ingress": ingress}
    return {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": "p"}, "spec": spec}


def test_without_a_policy_every_pod_reaches_the_dashboard(tmp_path):
    def who(*more):
        return [(way["who"], way["open"]) for way in planned(tmp_path, ray_cluster(), *more)["reach"]]

    assert "every pod" in who()[0][0]
    assert who(policy([])) == [("nobody", False)]
    assert who(policy([{"from": [{"podSelector": {"matchLabels": {"a": "b"}}}]}])) == [("pods a=b", False)]
    assert who(policy([{"from": [{"ipBlock": {"cidr": "0.0.0.0/0"}}]}])) == [("0.0.0.0/0", True)]
    assert "every pod" in who(policy([], {"matchLabels": {"of": "others"}}))[0][0]
    assert "every pod" in who(policy([], {"matchExpressions": [{"key": "a", "operator": "Exists"}]}))[0][0]


def test_a_policy_in_a_file_beside_counts_and_is_said_to_be_there(tmp_path):
    written(tmp_path, policy([]), name="policy.yaml")
    (tmp_path / "broken.yaml").write_text("{")
    found = planned(tmp_path, ray_cluster())
    assert [way["who"] for way in found["reach"]] == ["nobody"]
    assert any("another file" in line for line in found["notes"])


@pytest.mark.parametrize("head", [{"serviceType": "LoadBalancer"}, {"enableIngress": True},
                                  {"headService": {"spec": {"type": "NodePort"}}}])  # fmt: skip
def test_a_service_to_the_outside_is_open_to_everybody(tmp_path, head):
    assert any(way["open"] for way in planned(tmp_path, ray_cluster(head=head), policy([]))["reach"])


# Nine lines that stand for a thousand million words.
BOMB = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "empty"),
        ("[1, 2]", "neither a `ray up` file"),
        ("a: b: c", "no YAML that can be used: mapping values are not allowed"),
        ("kind: Pod\n", "neither a `ray up` file"),
        ("apiVersion: v1\nkind: Pod\n", "no cluster file"),
        (BOMB, "aliases repeat"),
        ("provider: {type: azure}\ncluster_name: c\n", "azure"),
        ("provider: {type: aws, region: r}\n", "cluster_name"),
        ("provider: {type: aws, region: r}\ncluster_name: c\nmax_worker: 3\n", "max_worker"),
        ("provider: {type: aws, region: r}\ncluster_name: c\navailable_node_types: [1]\n", "available_node_types"),
        (
            "provider: {type: aws, region: r}\ncluster_name: c\navailable_node_types: {a: {resources: {}}}\n",
            "node_config",
        ),
        ("apiVersion: ray.io/v1\nkind: RayCluster\n", "RayCluster"),
        ("apiVersion: ray.io/v1\nkind: RayJob\nspec: {entrypoint: x}\n", "rayClusterSpec"),
        (
            "apiVersion: ray.io/v1\nkind: RayCluster\n"
            "spec: {headGroupSpec: {}, workerGroupSpecs: [{groupName: g, replicas: many}]}\n",
            "many",
        ),
        ("apiVersion: ray.io/v1\nkind: RayJob\nspec: [1]\n", "RayJob"),
    ],
)
def test_what_is_no_cluster_file_is_an_error_of_one_line_that_names_it(tmp_path, text, said):
    path = tmp_path / "file.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"file\.yaml") as error:
        plan(str(path))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_two_clusters_in_one_file_are_not_added_up(tmp_path):
    with pytest.raises(ValueError, match="holds 2"):
        planned(tmp_path, ray_cluster(), ray_cluster())


def test_bytes_are_no_cluster_file(tmp_path):
    path = tmp_path / "file.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="no text"):
        plan(str(path))


@pytest.mark.parametrize("file", ["aws.yaml", "gcp.yaml", "kuberay/raycluster.yaml", "kuberay/rayjob.yaml"])
def test_our_own_files_have_prices_scale_to_zero_and_are_open_to_nobody(file, capfd):
    found = plan(str(CLUSTER / file))
    json.dumps(found)
    workers = [one for one in found["nodes"] if not one["head"]]
    assert {one["market"] for one in workers} == {"spot", "on-demand"}
    assert all(one["min"] == 0 and one["gpus"] == 4 and one["idle_s"] == 600 for one in workers)
    priorities = {one["market"]: one["priority"] for one in workers}
    assert priorities["spot"] > priorities["on-demand"]
    cost = found["cost"]
    assert 0 <= cost["at_rest"]["usd_hour"] < 1 < cost["most"]["usd_hour"] < cost["ceiling"]["usd_hour"]
    assert found["token"]
    assert not any(way["open"] for way in found["reach"])
    assert capfd.readouterr() == ("", "")  # Ray, which reads it, would tell what it fills in


def test_the_table_of_prices_is_dated_and_spot_is_the_cheaper_everywhere():
    prices = json.loads((CLUSTER / "prices.json").read_text())
    assert prices["date"] == "2026-11"
    assert prices["sources"]
    for cloud in ("aws", "gcp"):
        assert prices[cloud]["regions"]
        for name, machine in prices[cloud]["machines"].items():
            assert 0 < machine["spot"] < machine["on_demand"], name
            assert machine["cpus"] >= 2
            assert ("gpus" in machine) == ("gpu" in machine)
