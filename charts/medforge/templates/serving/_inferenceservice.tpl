{{/* The InferenceService of a track: (dict "root" $ "track" "stable" "release" digest). */}}
{{- define "medforge.inferenceService" -}}
{{- $root := .root -}}
{{- $p := $root.Values.predictor -}}
{{- $fullname := include "medforge.fullname" $root -}}
{{- $name := printf "%s-%s" $fullname .track -}}
{{- $vllm := eq $p.runtime "vllm" -}}
{{- $scaled := and $p.keda.enabled (eq .track "stable") -}}
{{- $selector := dict "serving.kserve.io/inferenceservice" $name -}}
apiVersion: serving.kserve.io/v1beta1
kind: InferenceService
metadata:
  name: {{ $name }}
  labels:
    {{- include "medforge.podLabels" $root | nindent 4 }}
    app.kubernetes.io/component: predictor
    medforge.io/track: {{ .track }}
  annotations:
    serving.kserve.io/deploymentMode: Standard
    serving.kserve.io/autoscalerClass: {{ ternary "keda" "none" $scaled }}
    medforge.io/managed-by-rollout: {{ eq $root.Values.rollout.managedBy "medforge" | quote }}
    medforge.io/release: {{ .release | quote }}
    {{- with .previous }}
    medforge.io/previous-release: {{ . | quote }}
    {{- end }}
spec:
  predictor:
    serviceAccountName: {{ $fullname }}-predictor
    automountServiceAccountToken: false
    minReplicas: {{ ternary $p.minReplicas 1 (eq .track "stable") }}
    maxReplicas: {{ ternary $p.maxReplicas 1 (eq .track "stable") }}
    {{- if $scaled }}
    autoScaling:
      metrics:
        - type: External
          external:
            metric:
              backend: prometheus
              serverAddress: {{ $p.keda.serverAddress }}
              query: {{ $p.keda.query | default (printf "sum(%s{namespace=\"%s\",pod=~\"%s-predictor-.+\"})" (ternary "vllm:num_requests_waiting" "medforge_predictor_queue_length" $vllm) $root.Release.Namespace $name) | quote }}
            target: {type: Value, value: {{ $p.keda.threshold | quote }}}
    {{- end }}
    deploymentStrategy:
      type: RollingUpdate
      rollingUpdate: {maxSurge: {{ $p.maxSurge }}, maxUnavailable: {{ $p.maxUnavailable }}}
    # preStop, the longest request, and some to spare
    terminationGracePeriodSeconds: {{ add 5 (ceil (float64 $p.timeoutSeconds)) 10 }}
    securityContext:
      {{- include "medforge.podSecurity" $root | nindent 6 }}
    topologySpreadConstraints:
      {{- include "medforge.spread" $selector | trim | nindent 6 }}
    {{- with $p.nodeSelector }}
    nodeSelector:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    {{- with $p.tolerations }}
    tolerations:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    {{- with $p.runtimeClassName }}
    runtimeClassName: {{ . }}
    {{- end }}
    {{- with $p.priorityClassName }}
    priorityClassName: {{ . }}
    {{- end }}
    {{- if $vllm }}
    # vLLM loads whatever it is given. So MedForge brings the release and proves it, and nothing else does: KServe adds no
    # storage initializer where there is one already (and what it adds would run after all others).
    initContainers:
      - name: storage-initializer
        image: {{ include "medforge.image" (list $root "data") }}
        imagePullPolicy: {{ $root.Values.images.pullPolicy }}
        command:
          - medforge
          - verify-release
          - {{ .release | quote }}
          - --bucket={{ $root.Values.objectStore.bucket }}
          - --out=/mnt/models/release
          {{- range compact (splitList "\n" (include "medforge.reviewersFiles" $root)) }}
          - --trusted=/etc/medforge/reviewers/{{ . }}
          {{- end }}
        env:
          {{- include "medforge.s3Environment" $root | trim | nindent 10 }}
        resources:
          requests: {cpu: "1", memory: 512Mi}
          limits: {memory: 2Gi}
        securityContext:
          {{- include "medforge.containerSecurity" $root | nindent 10 }}
        volumeMounts:
          - {name: release, mountPath: /mnt/models}
          - {name: release-tmp, mountPath: /tmp}
          - {name: reviewers, mountPath: /etc/medforge/reviewers, readOnly: true}
          {{- if $root.Values.objectStore.caConfigMap }}
          - {name: ca, mountPath: /etc/medforge/ca, readOnly: true}
          {{- end }}
    {{- with include "medforge.pullSecrets" $root | trim }}
    imagePullSecrets:
      {{- . | nindent 6 }}
    {{- end }}
    volumes:
      - name: release
        emptyDir: {}
      - name: release-tmp
        emptyDir: {sizeLimit: 256Mi}
      - name: reviewers
        configMap: {name: {{ include "medforge.reviewersConfigMap" $root }}}
      {{- if $root.Values.objectStore.caConfigMap }}
      - name: ca
        configMap: {name: {{ $root.Values.objectStore.caConfigMap }}}
      {{- end }}
    {{- end }}
    model:
      {{- if $vllm }}
      volumeMounts:
        - {name: release, mountPath: /mnt/models, readOnly: true}
      {{- end }}
      modelFormat: {name: {{ ternary "vLLM" "medforge" $vllm }}}
      runtime: {{ default (printf "%s-predictor" $fullname) $p.existingRuntime }}
      # without the slash at its end, what only begins like it would be fetched too
      storageUri: s3://{{ $root.Values.objectStore.bucket }}/releases/{{ .release }}/
      args:
        {{- if $vllm }}
        - --model=/mnt/models/release/model
        {{- if $p.existingRuntime }}
        - --served-model-name={{ $p.modelName }}
        {{- range $p.extraArgs }}
        - {{ . | quote }}
        {{- end }}
        {{- end }}
        {{- else }}
        - --model-dir=/mnt/models
        - --release={{ .release }}
        {{- end }}
      {{- $resources := deepCopy $p.resources }}
      {{- if gt (int $p.gpu.count) 0 }}
      {{- range $kind := list "requests" "limits" }}
      {{- $_ := set $resources $kind (merge (dict $p.gpu.resource (toString $p.gpu.count)) (default dict (get $resources $kind))) }}
      {{- end }}
      {{- end }}
      resources:
        {{- toYaml $resources | nindent 8 }}
{{- end -}}
