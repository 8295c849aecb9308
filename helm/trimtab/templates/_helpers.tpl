{{- /* Names, labels and images, told once. */}}

{{- define "trimtab.fullname" -}}
{{- default .Release.Name .Values.fullnameOverride | trunc 40 | trimSuffix "-" }}
{{- end }}

{{- define "trimtab.operator" -}}
{{ include "trimtab.fullname" . }}-operator
{{- end }}

{{- define "trimtab.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{ default (include "trimtab.operator" .) .Values.serviceAccount.name }}
{{- else -}}
{{ required "serviceAccount.create is false: name an existing account in serviceAccount.name" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{- define "trimtab.selector" -}}
app.kubernetes.io/name: trimtab
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: operator
{{- end }}

{{- /* Not app.kubernetes.io/managed-by: trimtab, which marks what the operator makes. */}}
{{- define "trimtab.labels" -}}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
app.kubernetes.io/name: trimtab
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- /* The reference of one image: include "trimtab.image" (list . "trainer"). */}}
{{- define "trimtab.image" -}}
{{- $root := index . 0 }}
{{- $image := index $root.Values.images (index . 1) }}
{{- $repository := $image.repository }}
{{- if $root.Values.images.registry }}
{{- $repository = printf "%s/%s" (trimSuffix "/" $root.Values.images.registry) $image.repository }}
{{- end }}
{{- if $image.reference -}}
{{ $image.reference }}
{{- else if $image.digest -}}
{{ $repository }}@{{ $image.digest }}
{{- else -}}
{{ $repository }}:{{ default $root.Chart.AppVersion $image.tag }}
{{- end }}
{{- end }}

{{- /* settings.json: what the operator is told. Absent keys are its own defaults. */}}
{{- define "trimtab.settings" -}}
{{- $images := dict "trainer" (include "trimtab.image" (list . "trainer")) "server" (include "trimtab.image" (list . "server")) }}
{{- $settings := dict
      "images" $images
      "imagePullSecrets" .Values.images.pullSecrets
      "namespaces" .Values.namespaces
      "preflight" .Values.preflight
      "rewards" .Values.rewards
      "workers" .Values.operator.workers
      "resyncSeconds" .Values.operator.resyncSeconds
      "startTimeoutSeconds" .Values.operator.startTimeoutSeconds
      "logLevel" .Values.operator.logLevel }}
{{- $storage := omit .Values.storage "output" }}
{{- if $storage }}
{{- $_ := set $settings "storage" $storage }}
{{- end }}
{{- with .Values.storage.output }}
{{- $_ := set $settings "output" . }}
{{- end }}
{{- toPrettyJson $settings }}
{{- end }}

{{- /* The restricted profile, as every pod of this chart has it. */}}
{{- define "trimtab.podSecurity" -}}
runAsNonRoot: true
runAsUser: 1000
runAsGroup: 1000
fsGroup: 1000
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "trimtab.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{- /* A role and its binding, in the cluster or in each namespace:
       include "trimtab.grant" (dict "root" . "name" NAME "account" ACCOUNT "rules" RULES "annotations" MAP) */}}
{{- define "trimtab.grant" -}}
{{- $grant := . }}
{{- $root := .root }}
{{- range $namespace := (default (list "") $root.Values.namespaces) }}
{{- $scope := ternary "Role" "ClusterRole" (ne $namespace "") }}
{{- range $kind := (list $scope (printf "%sBinding" $scope)) }}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: {{ $kind }}
metadata:
  name: {{ $grant.name }}
  {{- if $namespace }}
  namespace: {{ $namespace }}
  {{- end }}
  labels:
    {{- include "trimtab.labels" $root | nindent 4 }}
  {{- with $grant.annotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- if eq $kind $scope }}
rules:
  {{- $grant.rules | nindent 2 }}
{{- else }}
roleRef:
  apiGroup: rbac.authorization.k8s.io
  kind: {{ $scope }}
  name: {{ $grant.name }}
subjects:
  - kind: ServiceAccount
    name: {{ $grant.account }}
    namespace: {{ $root.Release.Namespace }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
