{{/* A Job that runs after install and upgrade, in the data image:
     (dict "root" $ "name" "store-check" "weight" 0 "command" (list …) "environment" yaml "configMap" name). */}}
{{- define "medforge.job" -}}
{{- $root := .root -}}
apiVersion: batch/v1
kind: Job
metadata:
  name: {{ include "medforge.fullname" $root }}-{{ .name }}
  labels:
    {{- include "medforge.labels" $root | nindent 4 }}
    app.kubernetes.io/component: {{ .name }}
  annotations:
    helm.sh/hook: post-install,post-upgrade
    helm.sh/hook-weight: {{ .weight | quote }}
    # a failed one stays, with its log, until the next
    helm.sh/hook-delete-policy: before-hook-creation,hook-succeeded
spec:
  backoffLimit: 6
  activeDeadlineSeconds: 900
  template:
    metadata:
      labels:
        {{- include "medforge.podLabels" $root | nindent 8 }}
        app.kubernetes.io/component: {{ .name }}
    spec:
      serviceAccountName: {{ include "medforge.fullname" $root }}-jobs
      automountServiceAccountToken: false
      enableServiceLinks: false
      restartPolicy: Never
      {{- with include "medforge.pullSecrets" $root | trim }}
      imagePullSecrets:
        {{- . | nindent 8 }}
      {{- end }}
      securityContext:
        {{- include "medforge.podSecurity" $root | nindent 8 }}
      containers:
        - name: {{ .name }}
          image: {{ include "medforge.image" (list $root "data") }}
          imagePullPolicy: {{ $root.Values.images.pullPolicy }}
          command:
            {{- toYaml .command | nindent 12 }}
          env:
            {{- .environment | trim | nindent 12 }}
          resources:
            requests: {cpu: 100m, memory: 256Mi}
            limits: {memory: 1Gi}
          securityContext:
            {{- include "medforge.containerSecurity" $root | nindent 12 }}
          volumeMounts:
            - {name: tmp, mountPath: /tmp}
            {{- if .configMap }}
            - {name: configuration, mountPath: /etc/medforge/configuration, readOnly: true}
            {{- end }}
            {{- if .token }}
            - {name: token, mountPath: /var/run/secrets/kubeflow/pipelines, readOnly: true}
            {{- end }}
            {{- if and .store $root.Values.objectStore.caConfigMap }}
            - {name: ca, mountPath: /etc/medforge/ca, readOnly: true}
            {{- end }}
      volumes:
        - name: tmp
          emptyDir: {sizeLimit: 1Gi}
        {{- if .configMap }}
        - name: configuration
          configMap: {name: {{ .configMap }}}
        {{- end }}
        {{- if .token }}
        - name: token
          projected:
            sources:
              - serviceAccountToken: {path: token, audience: pipelines.kubeflow.org, expirationSeconds: 7200}
        {{- end }}
        {{- if and .store $root.Values.objectStore.caConfigMap }}
        - name: ca
          configMap: {name: {{ $root.Values.objectStore.caConfigMap }}}
        {{- end }}
{{- end -}}
