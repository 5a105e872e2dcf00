{{- define "moe-bench.metadata" -}}
name: {{ required "name: moe_bench writes it" .Values.name }}
namespace: {{ .Values.namespace }}
labels: {{ toYaml .Values.labels | nindent 2 }}
{{- end }}

{{- define "moe-bench.literal" -}}
{{ . | toString | replace "$" "$$" | toJson }}
{{- end }}

{{- define "moe-bench.job" -}}
completionMode: Indexed
completions: {{ int64 .Values.nodes }}
parallelism: {{ int64 .Values.nodes }}
backoffLimit: {{ eq .Values.kind "Job" | ternary (mul .Values.maxRestarts .Values.nodes) 0 }}
{{- with .Values.timeLimitSeconds }}
activeDeadlineSeconds: {{ int64 . }}
{{- end }}
{{- if eq .Values.kind "Job" }}
podFailurePolicy:
  rules:
  - action: Ignore
    onPodConditions:
    - type: DisruptionTarget
      status: "True"
{{- end }}
template:
  metadata:
    labels: {{ toYaml .Values.labels | nindent 6 }}
  spec: {{ include "moe-bench.pod" . | nindent 4 }}
{{- end }}

{{- define "moe-bench.pod" -}}
restartPolicy: Never
subdomain: {{ .Values.name }}
terminationGracePeriodSeconds: {{ int64 .Values.graceSeconds }}
tolerations: {{ toYaml .Values.tolerations | nindent 0 }}
{{- if .Values.hostNetwork }}
hostNetwork: true
dnsPolicy: ClusterFirstWithHostNet
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector: {{ toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.imagePullSecret }}
imagePullSecrets:
- name: {{ . }}
{{- end }}
containers:
- name: ranks
  image: {{ required "image: moe_bench writes it" .Values.image }}
  workingDir: {{ .Values.workspace }}
  command:
  - bash
  - -c
  - {{ .Files.Get "files/pod.sh" | toJson }}
  - moe_bench
  args:
  - python
  - -m
  - torch.distributed.run
  - --nnodes={{ int64 .Values.nodes }}
  - --nproc-per-node={{ int64 .Values.ranksPerNode }}
  - --node-rank=$(NODE_RANK)
  - --master-addr={{ .Values.name }}-{{ eq .Values.kind "Job" | ternary "0" "node-0-0" }}.{{ .Values.name }}
  - --master-port={{ int64 .Values.port }}
  - --no-python
  - bash
  - -c
  - {{ .Files.Get "files/rank.sh" | toJson }}
  - moe_bench
  {{- range .Values.wrapper }}
  - {{ include "moe-bench.literal" . }}
  {{- end }}
  - python
  - -m
  - moe_bench.runtime.pretrain
  {{- range .Values.flags }}
  - {{ include "moe-bench.literal" . }}
  {{- end }}
  env:
  - name: NODE_RANK
    valueFrom:
      fieldRef:
        fieldPath: metadata.annotations['batch.kubernetes.io/job-completion-index']
  {{- range $name, $value := .Values.environment }}
  - name: {{ $name }}
    value: {{ include "moe-bench.literal" $value }}
  {{- end }}
  {{- if .Values.secret }}
  {{- range .Values.secretKeys }}
  - name: {{ . }}
    valueFrom:
      secretKeyRef:
        name: {{ $.Values.secret }}
        key: {{ . }}
        optional: true
  {{- end }}
  {{- end }}
  resources:
    limits: {{ toYaml .Values.resources | nindent 6 }}
    requests: {{ toYaml .Values.resources | nindent 6 }}
  {{- with .Values.capabilities }}
  securityContext:
    capabilities:
      add: {{ toYaml . | nindent 6 }}
  {{- end }}
  volumeMounts:
  - name: shm
    mountPath: /dev/shm
  - name: run
    mountPath: /etc/moe-bench
  {{- range .Values.volumes }}
  - name: {{ .name }}
    mountPath: {{ .mountPath }}
  {{- end }}
volumes:
- name: shm
  emptyDir:
    medium: Memory
    sizeLimit: {{ int64 .Values.shmGiB }}Gi
- name: run
  configMap:
    name: {{ .Values.name }}
{{- range .Values.volumes }}
- {{ merge (dict "name" .name) .source | toYaml | nindent 2 | trim }}
{{- end }}
{{- end }}
