{{- define "medforge.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{/* The name that all objects begin with. KServe makes DNS labels of it with -stable-predictor, so it is short. */}}
{{- define "medforge.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains (include "medforge.name" .) .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "medforge.name" .) | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* Never changed between versions: selectors are immutable. */}}
{{- define "medforge.selectorLabels" -}}
app.kubernetes.io/name: {{ include "medforge.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "medforge.labels" -}}
{{ include "medforge.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: medforge
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Of pods and what makes them: without versions, so that an upgrade of the chart alone does not load models anew. */}}
{{- define "medforge.podLabels" -}}
{{ include "medforge.selectorLabels" . }}
app.kubernetes.io/part-of: medforge
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* An image by digest, or by tag: (list $ "gateway"). */}}
{{- define "medforge.image" -}}
{{- $root := index . 0 -}}
{{- $image := index $root.Values.images (index . 1) -}}
{{- $repository := $image.repository -}}
{{- with $root.Values.images.registry -}}{{- $repository = printf "%s/%s" (trimSuffix "/" .) $repository -}}{{- end -}}
{{- if $image.digest -}}
{{- printf "%s%s@%s" $repository (ternary "" (printf ":%s" $image.tag) (empty $image.tag)) $image.digest -}}
{{- else -}}
{{- printf "%s:%s" $repository (default $root.Chart.AppVersion $image.tag) -}}
{{- end -}}
{{- end -}}

{{- define "medforge.pullSecrets" -}}
{{- range .Values.images.pullSecrets }}
- name: {{ . }}
{{- end }}
{{- end -}}

{{/* The user of the images, as Pod Security "restricted" asks. */}}
{{- define "medforge.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "medforge.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
capabilities: {drop: [ALL]}
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{/* Even over nodes and zones, as far as there are some. */}}
{{- define "medforge.spread" -}}
{{- range list "kubernetes.io/hostname" "topology.kubernetes.io/zone" }}
- maxSkew: 1
  topologyKey: {{ . }}
  whenUnsatisfiable: ScheduleAnyway
  labelSelector:
    matchLabels:
      {{- toYaml $ | nindent 6 }}
{{- end }}
{{- end -}}

{{- define "medforge.s3Endpoint" -}}
{{- if .Values.seaweedfs.enabled -}}
{{- printf "%s-seaweedfs.%s.svc.cluster.local:8333" (include "medforge.fullname" .) .Release.Namespace -}}
{{- else -}}
{{- .Values.objectStore.endpoint -}}
{{- end -}}
{{- end -}}

{{- define "medforge.s3Secure" -}}
{{- ternary "false" (toString .Values.objectStore.secure) .Values.seaweedfs.enabled -}}
{{- end -}}

{{/* What KServe's storage initializer reads from the Secret that it takes the keys from. */}}
{{- define "medforge.s3Annotations" -}}
serving.kserve.io/s3-endpoint: {{ include "medforge.s3Endpoint" . | quote }}
serving.kserve.io/s3-usehttps: {{ include "medforge.s3Secure" . | eq "true" | ternary "1" "0" | quote }}
serving.kserve.io/s3-verifyssl: {{ include "medforge.s3Secure" . | eq "true" | ternary "1" "0" | quote }}
serving.kserve.io/s3-region: {{ .Values.objectStore.region | quote }}
{{- with .Values.objectStore.caConfigMap }}
serving.kserve.io/s3-cabundle-configmap: {{ . | quote }}
{{- end }}
{{- end -}}

{{/* The environment by which the library finds the object store. */}}
{{- define "medforge.s3Environment" -}}
- name: MEDFORGE_S3_ENDPOINT
  value: {{ include "medforge.s3Endpoint" . | quote }}
- name: MEDFORGE_S3_SECURE
  value: {{ include "medforge.s3Secure" . | quote }}
- name: MEDFORGE_S3_REGION
  value: {{ .Values.objectStore.region | quote }}
- name: MEDFORGE_S3_ACCESS_KEY
  valueFrom: {secretKeyRef: {name: {{ .Values.objectStore.existingSecret }}, key: AWS_ACCESS_KEY_ID}}
- name: MEDFORGE_S3_SECRET_KEY
  valueFrom: {secretKeyRef: {name: {{ .Values.objectStore.existingSecret }}, key: AWS_SECRET_ACCESS_KEY}}
{{- if .Values.objectStore.caConfigMap }}
- name: SSL_CERT_FILE
  value: /etc/medforge/ca/cabundle.crt
{{- end }}
{{- end -}}

{{- define "medforge.reviewersConfigMap" -}}
{{- default (printf "%s-reviewers" (include "medforge.fullname" .)) .Values.reviewers.existingConfigMap -}}
{{- end -}}

{{/* Files of the reviewers' keys, one a line. */}}
{{- define "medforge.reviewersFiles" -}}
{{- ternary .Values.reviewers.files (keys .Values.reviewers.keys) (ne .Values.reviewers.existingConfigMap "") | sortAlpha | join "\n" -}}
{{- end -}}

{{/* The release that stable serves: the live one where rollouts change it, the values' otherwise. `lookup` finds
     nothing in a client's rendering, nor at the first install. */}}
{{- define "medforge.stableRelease" -}}
{{- $live := "" -}}
{{- if eq .Values.rollout.managedBy "medforge" -}}
{{- $found := lookup "serving.kserve.io/v1beta1" "InferenceService" .Release.Namespace (printf "%s-stable" (include "medforge.fullname" .)) -}}
{{- $live = dig "metadata" "annotations" "medforge.io/release" "" $found -}}
{{- end -}}
{{- default .Values.stable.release $live -}}
{{- end -}}

{{- define "medforge.previousRelease" -}}
{{- if eq .Values.rollout.managedBy "medforge" -}}
{{- $found := lookup "serving.kserve.io/v1beta1" "InferenceService" .Release.Namespace (printf "%s-stable" (include "medforge.fullname" .)) -}}
{{- dig "metadata" "annotations" "medforge.io/previous-release" "" $found -}}
{{- end -}}
{{- end -}}

{{/* Where the gateway finds a track's predictor: (list $ "stable"). */}}
{{- define "medforge.upstream" -}}
{{- $root := index . 0 -}}
{{- $port := ternary "" (printf ":%v" $root.Values.predictor.servicePort) (eq (int $root.Values.predictor.servicePort) 80) -}}
{{- $path := ternary "/v1" "/openai/v1" (and (eq $root.Values.predictor.runtime "vllm") (eq $root.Values.predictor.existingRuntime "")) -}}
{{- $path = default $path $root.Values.predictor.path -}}
{{- printf "http://%s-%s-predictor.%s.svc.cluster.local%s%s" (include "medforge.fullname" $root) (index . 1) $root.Release.Namespace $port $path -}}
{{- end -}}

{{/* The gateway's pods at most. */}}
{{- define "medforge.gatewayMost" -}}
{{- ternary .Values.gateway.autoscaling.maxReplicas .Values.gateway.replicas .Values.gateway.autoscaling.enabled -}}
{{- end -}}

{{- define "medforge.drainSeconds" -}}
{{- dig "drain_seconds" 30 .Values.gateway.settings -}}
{{- end -}}
